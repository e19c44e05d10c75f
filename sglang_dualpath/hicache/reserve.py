"""The fixed set of spare host pages that a prefill engine takes at start."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch

from sglang_dualpath.errors import ConfigError
from sglang_dualpath.ledger import Reserve
from sglang_dualpath.reader.pool import HostPages

logger = logging.getLogger(__name__)

# More than this share of a small host pool is better used as cache: fewer claims are exposed then.
_POOL_SHARE = 8


class HostReserve:
    """Allocates the spares from SGLang's host pool, and takes them again after SGLang clears it.

    Every rank takes the same number at the same point, so that the ranks' pools stay alike.

    Raises:
        ConfigError: the host pool is too small to spare a page.
    """

    def __init__(self, pool: Any, pages: HostPages, *, size_bytes: int, lock: threading.Condition) -> None:
        self._pool = pool
        self._pages = pages
        self._lock = lock
        count = min(max(2, size_bytes // pages.page_bytes), pages.slots // _POOL_SHARE)
        if count < 1:
            raise ConfigError(
                f"the host pool of {pages.slots} pages has none to spare; raise --hicache-size or --hicache-ratio"
            )
        self.reserve = Reserve(self._take(count))

    def _take(self, count: int) -> list[int]:
        indices = self._pool.alloc(count * self._pages.page_tokens)
        if indices is None:
            raise ConfigError(
                "the host pool has no free pages for the reserve; raise --hicache-size or --hicache-ratio"
            )
        return self._pages.slots_of(indices)

    def retake(self) -> None:
        """After ``pool.clear()``: keep pages that a late writer may still write to out of the pool, and take spares."""
        with self._lock:
            exposed = self.reserve.exposed_slots()
            everything = self._pool.alloc(self._pool.available_size())
            keep = torch.isin(everything // self._pages.page_tokens, torch.tensor(sorted(exposed), dtype=torch.int64))
            self._pool.free(everything[~keep])
            self.reserve.reseat(self._take(self.reserve.size - len(exposed)))
            if exposed:
                logger.warning("%d host pages stay out of the pool until their writers have ended.", len(exposed))
