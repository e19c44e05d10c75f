"""The decode side's queues: the host pages that a request was promised stay locked until its restore holds them."""

from __future__ import annotations

import logging
import time
from typing import Any

from sglang.srt.disaggregation.decode import DecodePreallocQueue, DecodeTransferQueue
from sglang.srt.disaggregation.decode_hicache_mixin import HiCacheRestoreResult

from sglang_dualpath import metrics
from sglang_dualpath.hicache.decode import DualPathDecodeTree
from sglang_dualpath.hicache.ranks import agreed

logger = logging.getLogger(__name__)

# A restore that found no device memory is tried again after this; device pages are freed when requests end.
_RETRY_S = 0.05


class DualPathDecodePreallocQueue(DecodePreallocQueue):
    """Locks the host prefix when a request is admitted. Upstream locks only its device part."""

    def _build_decode_prefix_match(self, req: Any, result: Any, **kwargs: Any) -> Any:
        match = super()._build_decode_prefix_match(req, result, **kwargs)
        match.dualpath_host_node = result.last_host_node
        return match

    def _start_hicache_prefetch(self, req: Any, prefix_match: Any) -> None:
        super()._start_hicache_prefetch(req, prefix_match)
        tree = self.tree_cache
        if not isinstance(tree, DualPathDecodeTree):
            return
        if prefix_match is not None and prefix_match.l2_host_hit_length > 0:
            prefix_match.dualpath_lock = tree.lock_host(prefix_match.dualpath_host_node)
        tree.release_kept(req.cache_request_handle)


class DualPathDecodeTransferQueue(DecodeTransferQueue):
    """A restore that falls short of device memory waits for it, as long as SGLang waits for a transfer.

    Ranks allocate alike, so it falls short on all of them or none. When to try again, and when no more, they agree.
    """

    def _try_hicache_queue_load_back(self, dr: Any) -> bool:
        now = time.monotonic()
        ranks = self.tree_cache.ranks
        retry_s: float | None = getattr(dr, "dualpath_retry_s", None)
        if retry_s is not None and not agreed(ranks, now >= retry_s):
            return False
        queued = super()._try_hicache_queue_load_back(dr)
        if queued:
            self._release(dr)
        elif dr.hicache_restore_status == HiCacheRestoreResult.FAILED:
            first = getattr(dr, "dualpath_short_since_s", None)
            if first is None:
                dr.dualpath_short_since_s = first = now
                metrics.FALLBACKS.add(reason="restore_waits_for_device")
                logger.warning("Request %s waits for device memory to restore its prefix.", dr.req.rid)
            if agreed(ranks, now - first < dr.kv_receiver.kv_mgr.waiting_timeout):
                dr.hicache_restore_status = HiCacheRestoreResult.PENDING
                dr.dualpath_retry_s = now + _RETRY_S
        return bool(queued)

    def _clean_hicache_prefetch_resources(self, decode_req: Any) -> None:
        super()._clean_hicache_prefetch_resources(decode_req)
        self._release(decode_req)

    def _release(self, decode_req: Any) -> None:
        match = decode_req.prefix_match
        lock = getattr(match, "dualpath_lock", None)
        if lock is not None:
            match.dualpath_lock = None
            self.tree_cache.unlock_host(lock)
