"""SGLang's prefetches, made small: what a request asked to be read, and the thread that waits for it by batches."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_dualpath.reader.decode import DecodeRead, DecodeReads
from sglang_dualpath.reader.prefetch import Prefetch
from sglang_dualpath.reader.prefill import PrefillReads
from tests.reader.host import WAIT_S, Slots, content

BATCH_PAGES = 8


@dataclass(eq=False)
class Job:
    """One prefetch of one engine."""

    room: int | None
    prefetch: Prefetch
    hashes: list[str]
    pool: Slots
    started_s: float
    read: DecodeRead | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    ended_s: float = 0.0
    kept: int = 0
    completed: int = 0
    """Pages of finished batches, which an abort frees at once."""
    released: int = 0
    inserted: bool = False

    def slots(self) -> list[int]:
        return self.pool.pages.slots_of(self.prefetch.host_indices)

    def result(self, within_s: float = WAIT_S) -> int:
        """Pages that the prefetch brought."""
        assert self.done.wait(within_s), f"the read of room {self.room} did not end within {within_s} s"
        return self.kept

    def check(self) -> None:
        """Every page that SGLang was given holds what was stored for it."""
        for page_hash, slot in list(zip(self.hashes, self.slots(), strict=True))[: self.kept]:
            assert self.pool.read(slot) == content(page_hash), f"wrong bytes in {page_hash}"

    def abort(self) -> None:
        """As SGLang does it: mark the operation, and free what was acknowledged of it at once."""
        with self.pool.lock:  # the end of the transfer either sees it, with what was released, or came before it
            if self.inserted:
                return
            self.cancelled.set()
            self.released = self.completed
            self.pool.free(self.slots()[: self.released])


class PrefetchThread:
    """SGLang's prefetch IO thread: one operation after the other, in batches, then the end of the transfer."""

    def __init__(self, reads: PrefillReads | DecodeReads, pool: Slots, over: Callable[[Job], None]) -> None:
        self._reads = reads
        self._pool = pool
        self._over = over
        self.queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self._run, name="prefetch-io", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (job := self.queue.get()) is not None:
            try:
                self._transfer(job)
            except BaseException as fault:
                self.errors.append(fault)

    def _transfer(self, job: Job) -> None:
        got = 0
        while got < job.prefetch.pages and not job.cancelled.is_set():
            count = min(BATCH_PAGES, job.prefetch.pages - got)
            landed = self._reads.wait(job.prefetch, job.prefetch.next_batch(count), count)
            got += landed
            with self._pool.lock:
                if not job.cancelled.is_set():
                    job.completed = got
            if landed < count:
                break
        self._reads.finish(job.prefetch)
        with self._pool.lock:
            if job.cancelled.is_set():
                self._pool.free(job.slots()[job.released :])
            else:
                job.inserted, job.kept = True, got
                self._pool.seal(job.slots()[:got])
                self._pool.free(job.slots()[got:])
        job.ended_s = time.monotonic()
        self._over(job)
        job.done.set()
