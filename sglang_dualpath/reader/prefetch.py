"""One prefetch operation of SGLang's HiCache, as the read paths see it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from sglang_dualpath.reader.pool import HostPages


@dataclass(eq=False)
class Prefetch:
    """Pages ``first_page .. end_page`` of a prompt, to be brought into this engine's host pages.

    ``hashes`` are the page hashes in order; ``host_indices`` (int64, ``len(hashes) * page_tokens``) says where each
    page goes. It is SGLang's own tensor: rewriting it here is how a page moves to a spare.
    """

    handle: Hashable
    first_page: int
    stored_pages: int
    """Leading pages that are in storage; the rest is only in the decode engine's host memory."""
    hashes: Sequence[str]
    host_indices: torch.Tensor
    read_pages: Callable[[int, Sequence[int]], int]
    """``read_pages(first, slots)`` reads the pages from index ``first`` on out of storage into ``slots`` and returns
    how many leading ones are good. Runs on a reader thread; may raise whatever the storage backend raises."""
    is_cancelled: Callable[[], bool]
    """True once SGLang terminated the operation or stops its storage threads."""
    cursor: int = 0
    """Pages that SGLang has asked for."""
    over: bool = False
    """SGLang's transfer has ended: the pages belong to the tree or the pool, and nothing may be read into them."""

    def next_batch(self, pages: int) -> int:
        """SGLang asks for its next ``pages`` pages; returns the index of the first."""
        first = self.cursor
        self.cursor += pages
        return first

    @property
    def pages(self) -> int:
        return len(self.hashes)

    @property
    def end_page(self) -> int:
        return self.first_page + len(self.hashes)

    def move(self, pool: HostPages, first_page: int, slots: Sequence[int]) -> None:
        """From ``first_page`` on, pages go to ``slots`` from now on."""
        start = (first_page - self.first_page) * pool.page_tokens
        indices = pool.indices(slots)
        self.host_indices[start : start + len(indices)] = indices


@dataclass
class Rate:
    """A measured rate in bytes per second: total bytes over busy seconds, old measurements fading out."""

    # Twenty chunks: long enough to even out one slow read, short enough to follow a NIC that others begin to use.
    memory: float = 0.95
    _bytes: float = 0.0
    _seconds: float = 0.0
    _until_s: float = float("-inf")

    def add(self, size_bytes: int, seconds: float, *, ended_s: float | None = None) -> None:
        """``size_bytes`` took ``seconds``. With ``ended_s`` time that readers side by side were busy counts once."""
        if ended_s is not None:
            seconds = min(seconds, ended_s - self._until_s)
            self._until_s = max(self._until_s, ended_s)
        self._bytes = self._bytes * self.memory + size_bytes
        self._seconds = self._seconds * self.memory + max(seconds, 1e-6)

    @property
    def bytes_per_s(self) -> float | None:
        return self._bytes / self._seconds if self._seconds else None


@dataclass
class ReadLimit:
    """Holds readers to ``bytes_per_s`` in the long run (0: no limit): each waits for the time of what was read before.

    So how long to wait is known before there is anything to read, and nobody waits with a claim in hand.
    """

    bytes_per_s: float
    clock: Callable[[], float] = time.monotonic
    _free_at: float = field(default=0.0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def delay_s(self) -> float:
        """Seconds until the next read may begin."""
        with self._lock:
            return max(0.0, self._free_at - self.clock())

    def spend(self, size_bytes: int) -> None:
        """A read of ``size_bytes`` begins."""
        if self.bytes_per_s > 0:
            with self._lock:
                self._free_at = max(self.clock(), self._free_at) + size_bytes / self.bytes_per_s
