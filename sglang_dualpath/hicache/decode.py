"""The decode server's tree: what it holds, what it prefetches for an offer, and locks until the restore has begun."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome, MatchPrefixParams
from sglang.srt.mem_cache.common import _req_radix_key
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_dualpath import metrics
from sglang_dualpath.hicache.controller import DualPathCacheController
from sglang_dualpath.hicache.ranks import Ranks, SoleRank
from sglang_dualpath.hicache.tracked import HostLock, Tracked
from sglang_dualpath.reader.decode import Answer, DecodeRead, DecodeReads, Standing
from sglang_dualpath.reader.prefetch import Prefetch

logger = logging.getLogger(__name__)

# A prefetch that found no host pages is tried again after this: about as long as a small prefetch takes.
_PARK_S = 0.05
# Page hashes known to be in storage, so that they are not written back; 64 bytes of text each.
_REMEMBERED_HASHES = 200_000


class DecodePath:
    """Between one decode engine's HiCache and its reads. Implements ``StoragePath``; scheduler thread unless said.

    What the scheduler thread does to the tree it does in the same iteration on every rank of the server: as told by
    SGLang, whose own events come to all ranks alike, or as agreed in :meth:`tick`.
    """

    def __init__(
        self,
        tree: DualPathDecodeTree,
        controller: DualPathCacheController,
        reads: DecodeReads,
        ranks: Ranks | None = None,
    ) -> None:
        self.reads = reads
        self.ranks = ranks or SoleRank()
        self._tree = tree
        self._controller = controller
        self._page_tokens = reads.pages.page_tokens
        self._tracked: dict[int, Tracked] = {}
        """By room, in the order of their acceptance."""
        self._by_handle: dict[Any, Tracked] = {}
        self._kept: dict[Any, HostLock] = {}
        """Locks on what a read brought, by handle, until the request's restore holds its own."""
        self._kept_handles: dict[Any, Any] = {}
        """Handles of these locks by receiver: a request may leave when its read is over and forgotten."""
        self._opening = threading.Lock()
        self._stored: OrderedDict[str, None] = OrderedDict()

    # -- life of a request -------------------------------------------------------------------------------------------

    def accept(self, req: Any, receiver: Any) -> DecodeRead | None:
        """The decode queue took ``req``: match it without touching it, lock what is held, and start its read."""
        room = req.bootstrap_room
        if room in self._tracked:
            # Samples of one request share a room; the first one's read serves them all.
            return None
        match = self._match(req)
        slots, hashes = self._held_pages(match.last_host_node)
        lock = self._tree.lock_host(match.last_host_node) if slots else None
        matched = match.device_prefix_len + match.host_hit_length
        read = self.reads.accepted(
            room,
            req.cache_request_handle,
            match_pages=matched // self._page_tokens,
            held_slots=slots,
            held_hashes=hashes,
        )
        self._tracked[room] = self._by_handle[req.cache_request_handle] = Tracked(read, req, receiver, lock)
        return read

    def read_for(self, room: int, receiver: Any) -> DecodeRead | None:
        """The read that was started for the request of ``receiver``, if there is one."""
        tracked = self._tracked.get(room)
        return tracked.read if tracked is not None and tracked.receiver is receiver else None

    def tick(self) -> None:
        """Agree on what has become of the reads: start prefetches for offers, and release what ended reads held.

        Prefetches start in the order of the offers: one that has to wait for room lets no younger one pass.
        Only what was agreed counts here. A read that ends on this rank meanwhile brings nothing, which SGLang's own
        reduction over the ranks allows for.
        """
        tracked = list(self._tracked.values())
        if not tracked:
            return
        here = [self.reads.standing(one.read) for one in tracked]
        agreed = iter(self.ranks.least([value for standing in here for value in standing]))
        everywhere = [(one, Standing(*(next(agreed) for _ in mine))) for one, mine in zip(tracked, here, strict=True)]
        is_full = False
        for one, standing in sorted(everywhere, key=lambda pair: pair[1].order):
            if one.asks and standing.answer == Answer.NONE:
                one.asks = False
                self.reads.withdraw(one.read)
            elif one.asks and standing.answer == Answer.OFFER and not is_full:
                one.asks = one.is_parked = False
                self._begin(one, standing)
            is_full = is_full or (one.asks and one.is_parked)
            if standing.over:
                del self._tracked[one.read.room]
                self._by_handle.pop(one.read.handle, None)
                self.reads.forget(one.read)
                if one.held is not None:
                    self._tree.unlock_host(one.held)

    def gone(self, room: int, receiver: Any) -> None:
        """The request of ``receiver`` has left the queues. Only the one that a read was started for ends it."""
        kept = self._kept_handles.pop(receiver, None)
        if kept is not None:
            self.release_kept(kept)
        tracked = self._tracked.get(room)
        if tracked is None or tracked.receiver is not receiver or tracked.req is None:
            return
        # Its room stays taken until its read is over.
        tracked.req = None
        self.reads.gone(room)
        handle = tracked.read.handle
        if tracked.asks or self._tree.has_ongoing_prefetch(handle):
            # Upstream's prealloc queue never does this for a request that it drops, and the prefetch would go on.
            self._tree.finish(handle, CacheRequestOutcome.ABORT)

    def release_kept(self, handle: Any) -> None:
        """The request's restore holds its own lock, or there will be none."""
        lock = self._kept.pop(handle, None)
        if lock is not None:
            self._tree.unlock_host(lock)

    def _begin(self, tracked: Tracked, offered: Standing) -> None:
        try:
            self._start(tracked, offered)
        except Exception:
            # As upstream does around the same call: a prefetch that cannot be had must not end the scheduler.
            logger.exception("No prefetch for room %s.", tracked.read.room)
            metrics.FALLBACKS.add(reason="prefetch_exception")
            self.reads.without_prefetch(tracked.read, "prefetch_exception")

    def _start(self, tracked: Tracked, offered: Standing) -> None:
        read, req = tracked.read, tracked.req
        match = self._match(req)
        matched = match.device_prefix_len + match.host_hit_length
        end_tokens = offered.end_page * self._page_tokens
        if matched // self._page_tokens < -offered.minus_first_page:
            self.reads.without_prefetch(read, "prefix_gap")
            return
        if end_tokens <= matched:
            self.reads.without_prefetch(read)
            return
        anchor = match.last_host_node
        tree = self._tree
        if not (tree.is_backuped(anchor) or tree.is_root(anchor)):
            self.reads.without_prefetch(read, "prefix_not_in_host_memory")
            return
        if end_tokens - matched < tree.prefetch_threshold:
            self.reads.without_prefetch(read, "below_threshold")
            return
        tree.prefetch_from_storage(
            read.handle,
            anchor,
            req.origin_input_ids[matched:],
            tree.get_last_hash_value(anchor),
            tree.get_prefix_hash_values(anchor) if tree.hicache_storage_pass_prefix_keys else None,
            matched_prefix_tokens=req.origin_input_ids[:matched],
            extra_key=req.extra_key,
            cache_salt=req.cache_salt,
            storage_hit_end=end_tokens,
        )
        if tree.has_ongoing_prefetch(read.handle):
            self.reads.submitted(read)
        else:
            self._park(tracked, "prefetch_rate_limited")

    # -- what the tree reports ---------------------------------------------------------------------------------------

    def allocated(self, operation: Any) -> None:
        """The operation has its host pages: claims may go out, once."""
        with self._opening:
            tracked = self._by_handle.get(operation.handle)
            if tracked is None:
                return
            prefetch: Prefetch | None = getattr(operation, "dualpath_prefetch", None)
            if prefetch is None:
                # On the operation itself: it is still listed as ongoing after its transfer has ended.
                operation.dualpath_prefetch = prefetch = self._prefetch(operation)
                for page_hash in operation.hash_value:
                    self._stored[page_hash] = None
                while len(self._stored) > _REMEMBERED_HASHES:
                    self._stored.popitem(last=False)
        # By whoever comes here first, the scheduler or the IO thread that is about to wait for its pages.
        self.reads.opened(tracked.read, prefetch)

    def _prefetch(self, operation: Any) -> Prefetch:
        pages = self.reads.pages
        controller = self._controller
        stop = controller.storage_stop_event
        return Prefetch(
            handle=operation.handle,
            first_page=operation.storage_start // self._page_tokens,
            stored_pages=len(operation.hash_value),
            hashes=operation.hash_value,
            host_indices=operation.host_indices,
            read_pages=lambda first, slots: controller.read_pages(operation, first, pages.indices(slots)),
            is_cancelled=lambda: operation.is_terminated() or stop.is_set(),
        )

    def revoked(self, handle: Any) -> None:
        """There were no host pages for the prefetch."""
        tracked = self._by_handle.get(handle)
        if tracked is not None:
            self._park(tracked, "host_pool_full")

    def _park(self, tracked: Tracked, reason: str) -> None:
        tracked.asks = tracked.is_parked = True
        self.reads.parked(tracked.read, _PARK_S, reason)

    def inserted(self, handle: Any) -> None:
        """What the prefetch brought is in the tree: hold it there until the restore, and let the request go on."""
        tracked = self._by_handle.get(handle)
        if tracked is None:
            return
        self._tree.pop_prefetch_loaded_tokens(handle)
        if tracked.req is not None and handle not in self._kept:
            lock = self._tree.lock_host(self._match(tracked.req).last_host_node)
            if lock is not None:
                self._kept[handle] = lock
                self._kept_handles[tracked.receiver] = handle
        self.reads.settled(tracked.read)

    # -- StoragePath, on the controller's threads --------------------------------------------------------------------

    def page_get(self, operation: Any, hashes: Sequence[str]) -> int:
        # The scheduler opens an operation in the tick in which it queues it for this thread, perhaps just after.
        self.allocated(operation)
        prefetch: Prefetch | None = getattr(operation, "dualpath_prefetch", None)
        if prefetch is None:
            return 0
        return self.reads.wait(prefetch, prefetch.next_batch(len(hashes)), len(hashes))

    def transfer_over(self, operation: Any) -> None:
        with self._opening:
            if getattr(operation, "dualpath_prefetch", None) is None:
                # Never asked for: made here, so that it cannot be opened after it has ended.
                operation.dualpath_prefetch = self._prefetch(operation)
        self.reads.finish(operation.dualpath_prefetch)

    def extend_hit(self, handle: Any, hashes: Sequence[str], stored: int) -> int:
        return stored

    def unwritten(self, hashes: Sequence[str], prefix: Sequence[str] | None) -> list[int]:
        unknown = [which for which, page_hash in enumerate(hashes) if page_hash not in self._stored]
        if not unknown:
            return []
        # What prefill read alone is in storage too. Some backends would write it again, so ask for the leading ones.
        first = unknown[0]
        backend = self._controller.storage_backend
        try:
            about = None if prefix is None else HiCacheStorageExtraInfo(prefix_keys=[*prefix, *hashes[:first]])
            known = backend.batch_exists(list(hashes[first:]), about) if backend is not None else 0
        except Exception as fault:
            # Writing a page twice is harmless; what is wrong with the backend may go on to harm reads.
            metrics.FALLBACKS.add(reason="write_back_query_exception")
            logger.warning("Storage cannot say which of %d pages it holds, so all are written: %r", len(unknown), fault)
            known = 0
        return [which for which in unknown if which >= first + known]

    def written_back(self, pages: int) -> None:
        metrics.WRITTEN_BACK_BYTES.add(pages * self.reads.pages.page_bytes)

    def waits_for_room(self) -> bool:
        # Prefetches under way give back the host pages of what their prefill engines read, about half. One that began
        # with a part would have nothing to read when that is done, while its prefill engine reads the rest alone.
        return len(self._tree.ongoing_prefetch) > 1

    def forget(self) -> None:
        """The pools and the tree were cleared, and every lock with them."""
        self._tracked.clear()
        self._by_handle.clear()
        self._kept.clear()
        self._kept_handles.clear()
        self._stored.clear()

    # -- tree ----------------------------------------------------------------------------------------------------------

    def _match(self, req: Any) -> Any:
        key = _req_radix_key(self._tree, req, req.origin_input_ids)
        return self._tree.match_prefix(MatchPrefixParams(key=key, cow_mamba=False))

    def _held_pages(self, node: Any) -> tuple[list[int], list[str]]:
        """Host slots and hashes of the leading pages on the path to ``node`` that are in host memory."""
        slots: list[int] = []
        hashes: list[str] = []
        if self._tree.is_root(node):
            return slots, hashes
        # Named when their copy out of device memory is queued, host pages hold something else until it is acknowledged.
        unfinished = {copied for copy in self._tree.ongoing_write_through.values() for copied in copy.publish_node_ids}
        core = self._tree.tree_core
        for info in core.collect_path_info([node])[0]:
            if info.node_id in unfinished:
                break
            spec = core.build_storage_backup_spec(info.node_id, False)
            if spec is None:
                break
            slots += self.reads.pages.slots_of(spec.host_value)
            hashes += spec.hash_value
        return slots, hashes


class DualPathDecodeTree(UnifiedRadixCache):
    """Stock until :meth:`use` names a path."""

    _dualpath: DecodePath | None = None
    ranks: Ranks = SoleRank()

    def use(self, path: DecodePath) -> None:
        self._dualpath = path
        self.ranks = path.ranks
        # Upstream skips load-backs of fewer tokens than this, and then fails a decode request that was promised them.
        self.load_back_threshold = 0

    def query_storage_hit_length(self, *args: Any, **kwargs: Any) -> int:
        # Nothing in storage is promised: what a read brought is in host memory by now, the rest comes from prefill.
        if self._dualpath is None:
            return int(super().query_storage_hit_length(*args, **kwargs))
        return 0

    def release_kept(self, handle: Any) -> None:
        """The request's admission holds its own lock on what its read brought."""
        if self._dualpath is not None:
            self._dualpath.release_kept(handle)

    def lock_host(self, node: Any) -> HostLock | None:
        """Keep what is in host memory on the path to ``node`` there; None if nothing is.

        A match may end in a node that is in device memory alone. A host lock of that one would hold nothing, and once
        it is evicted the lock could not be released: its id is unknown then. So the last node in host memory is locked.
        """
        last = None
        if not self.is_root(node):
            for info in self.tree_core.collect_path_info([node])[0]:
                if not self.is_backuped(info.node_id):
                    break
                last = info.node_id
        return None if last is None else HostLock(last, self.inc_host_lock_ref(last).to_dec_params())

    def unlock_host(self, lock: HostLock) -> None:
        self.dec_host_lock_ref(lock.node, lock.receipt)

    def _handle_prefetch_result(self, operation: Any) -> None:
        super()._handle_prefetch_result(operation)
        if self._dualpath is not None:
            self._dualpath.inserted(operation.handle)

    def revoke_pending_prefetch(self, request: Any) -> None:
        known = request in self.ongoing_prefetch
        super().revoke_pending_prefetch(request)
        if known and self._dualpath is not None:
            self._dualpath.revoked(request)

    def check_hicache_events(self) -> None:
        super().check_hicache_events()
        path = self._dualpath
        if path is not None:
            for info in list(self.ongoing_prefetch.values()):
                if info.operation.host_indices is not None:
                    path.allocated(info.operation)
            path.tick()

    def reset(self) -> None:
        path = self._dualpath
        if path is not None:
            path.reads.abandon_all()
        super().reset()
        if path is not None:
            path.forget()
