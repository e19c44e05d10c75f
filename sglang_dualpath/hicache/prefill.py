"""The prefill server's tree: tells the reads when SGLang starts, declines and ends a prefetch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_dualpath import metrics
from sglang_dualpath.hicache.controller import DualPathCacheController
from sglang_dualpath.hicache.plans import SharedPlans
from sglang_dualpath.hicache.reserve import HostReserve
from sglang_dualpath.protocol import NoOfferReason
from sglang_dualpath.reader.prefetch import Prefetch
from sglang_dualpath.reader.prefill import PrefillReads

logger = logging.getLogger(__name__)


class PrefillPath:
    """Between one prefill engine's HiCache and its reads. Implements ``StoragePath``.

    ``plans``: how several ranks agree on who reads; one rank decides alone.
    """

    def __init__(
        self, controller: DualPathCacheController, reads: PrefillReads, plans: SharedPlans | None = None
    ) -> None:
        self.reads = reads
        self._plans = plans
        self._controller = controller
        self._page_tokens = reads.pages.page_tokens
        self._opening = threading.Lock()
        self._starts: dict[Any, int] = {}
        """First pages of what is being submitted, for the hit query: it may run before SGLang has noted the start."""
        self._stored: dict[Any, int] = {}
        """Pages that storage has, of prefetches that go on to what a decode engine holds."""
        self.park: Callable[[Any, str], None] = lambda handle, reason: None

    # -- scheduler thread ----------------------------------------------------------------------------------------

    def starting(self, handle: Any, matched_tokens: int) -> None:
        """A prefetch that continues ``matched_tokens`` is about to be submitted."""
        self._starts[handle] = matched_tokens // self._page_tokens
        self._stored.pop(handle, None)

    def declined(self, handle: Any, reason: NoOfferReason) -> None:
        self._starts.pop(handle, None)
        self._stored.pop(handle, None)
        self.reads.declined(handle, reason)

    def tick(self, ongoing: Iterable[Any]) -> None:
        """Open the reads of those of SGLang's operations that have their host pages, and agree who reads them."""
        ready = [operation for operation in ongoing if operation.host_indices is not None]
        for operation in ready:
            self.allocated(operation)
        if self._plans is not None:
            self._plans.agree(ready)

    def allocated(self, operation: Any) -> Prefetch:
        """The operation has its host pages: open the read, once."""
        with self._opening:
            known: Prefetch | None = getattr(operation, "dualpath_prefetch", None)
            if known is None:
                # On the operation itself: it is still listed as ongoing after its transfer has ended.
                known = operation.dualpath_prefetch = self._prefetch(operation)
        self.reads.opened(known)
        return known

    def _prefetch(self, operation: Any) -> Prefetch:
        pages = self.reads.pages
        controller = self._controller
        stop = controller.storage_stop_event
        hashes = operation.hash_value
        return Prefetch(
            handle=operation.handle,
            first_page=operation.storage_start // self._page_tokens,
            stored_pages=min(len(hashes), self._stored.get(operation.handle, len(hashes))),
            hashes=hashes,
            host_indices=operation.host_indices,
            read_pages=lambda first, slots: controller.read_pages(operation, first, pages.indices(slots)),
            is_cancelled=lambda: operation.is_terminated() or stop.is_set(),
        )

    # -- StoragePath ---------------------------------------------------------------------------------------------

    def page_get(self, operation: Any, hashes: Sequence[str]) -> int:
        prefetch = self.allocated(operation)
        return self.reads.wait(prefetch, prefetch.next_batch(len(hashes)), len(hashes))

    def transfer_over(self, operation: Any) -> None:
        self._starts.pop(operation.handle, None)
        # Opened here at the latest, so that it cannot be opened after it has ended.
        self.reads.finish(self.allocated(operation))
        self._stored.pop(operation.handle, None)

    def extend_hit(self, handle: Any, hashes: Sequence[str], stored: int) -> int:
        start = self._starts.get(handle)
        if start is None:
            return stored
        held = self.reads.held_pages(handle, start + stored, start + len(hashes))
        reached = min(held - start, len(hashes))
        if reached <= stored:
            return stored
        self._stored[handle] = stored
        return reached

    def unwritten(self, hashes: Sequence[str], prefix: Sequence[str] | None) -> list[int]:
        return list(range(len(hashes)))

    def waits_for_room(self) -> bool:
        return False  # as upstream: what is missing is computed

    def written_back(self, pages: int) -> None:
        metrics.WRITTEN_BACK_BYTES.add(pages * self.reads.pages.page_bytes)

    def forget(self) -> None:
        """The pools were cleared."""
        self._starts.clear()
        self._stored.clear()


class DualPathPrefillTree(UnifiedRadixCache):
    """Stock until :meth:`use` names a path."""

    _dualpath: PrefillPath | None = None
    _reserve: HostReserve | None = None

    def use(self, path: PrefillPath, reserve: HostReserve) -> None:
        self._dualpath = path
        self._reserve = reserve

    def prefetch_from_storage(
        self, request: Any, last_host_node_id: Any, new_input_tokens: Any, *args: Any, **kwargs: Any
    ) -> bool | None:
        path = self._dualpath
        if path is not None and request not in self.ongoing_prefetch:
            path.starting(request, len(kwargs.get("matched_prefix_tokens") or ()))
        answer: bool | None = super().prefetch_from_storage(
            request, last_host_node_id, new_input_tokens, *args, **kwargs
        )
        if path is not None and request not in self.ongoing_prefetch:
            if len(new_input_tokens) < self.prefetch_threshold:
                path.declined(request, NoOfferReason.BELOW_THRESHOLD)
            elif self.cache_controller.prefetch_rate_limited():
                path.park(request, "prefetch_rate_limited")
            else:
                path.declined(request, NoOfferReason.NO_HITS)
        return answer

    def revoke_pending_prefetch(self, request: Any) -> None:
        info = self.ongoing_prefetch.get(request)
        super().revoke_pending_prefetch(request)
        path = self._dualpath
        if path is None or info is None:
            return
        operation = info.operation
        if operation.storage_hit_count >= self.prefetch_threshold and not operation.is_terminated():
            # There are hits but no host pages for them now.
            path.park(request, "host_pool_full")
        elif operation.storage_hit_count > 0:
            path.declined(request, NoOfferReason.BELOW_THRESHOLD)
        else:
            path.declined(request, NoOfferReason.NO_HITS)

    def check_hicache_events(self) -> None:
        super().check_hicache_events()
        if self._dualpath is not None:
            self._dualpath.tick([info.operation for info in self.ongoing_prefetch.values()])

    def release_aborted_request(self, request: Any) -> None:
        super().release_aborted_request(request)
        if self._dualpath is not None:
            self._dualpath.reads.gone(request)

    def reset(self) -> None:
        # Called by the constructor too, before there is any path.
        if self._dualpath is None or self._reserve is None:
            super().reset()
            return
        self._dualpath.reads.abandon_all()
        super().reset()
        self._dualpath.forget()
        self._reserve.retake()
