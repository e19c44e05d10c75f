"""What a patched or later SGLang offers by itself. Where it does, the hook that stands in for it here is not used.

Each name is that of a patch in ``patches/``, which says what it adds and why. Looked at in the process that asks: the
installed source decides.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Final

logger = logging.getLogger(__name__)

STORAGE_REQUEST_HANDLE: Final = "hicache-storage-request-handle"
REGISTER_KV_CLASSES: Final = "register-kv-classes"
STATUS_OF_A_CLEARED_ROOM: Final = "status-of-a-cleared-room"
DATA_PARALLEL_RANK_OF_A_ROOM: Final = "data-parallel-rank-of-a-room"


def has(name: str) -> bool:
    """Whether the installed SGLang has what the patch of this name adds. Raises KeyError for a name that is none."""
    return _LOOKS[name]()


def register_kv_classes(backend: str, classes: Callable[[], Mapping[Any, type]]) -> None:
    """Natively register the classes of a transfer backend, by ``KVClassType``. Raises ValueError if there are some."""
    from sglang.srt.disaggregation import utils

    register: Any = vars(utils)["register_kv_classes"]
    register(utils.TransferBackend(backend), classes)


def log() -> None:
    """Say which hooks are not used."""
    offered = [name for name in _LOOKS if has(name)]
    if offered:
        logger.info("SGLang offers by itself, so DualPath does not hook: %s.", ", ".join(offered))


def _storage_request_handle() -> bool:
    """Is there a place for it, and do hit queries and reads fill it in? Half of a patch is as good as none."""
    try:
        from sglang.srt.managers.cache_controller import HiCacheController
        from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo
        from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

        askers = (HybridCacheController._storage_hit_query, HiCacheController._page_transfer)
    except (ImportError, AttributeError):
        return False  # changed beyond what this knows, which the check of seams is for
    has_place = "handle" in {field.name for field in dataclasses.fields(HiCacheStorageExtraInfo)}
    return has_place and all("handle" in asker.__code__.co_names for asker in askers)


def _register_kv_classes() -> bool:
    from sglang.srt.disaggregation import utils

    return "register_kv_classes" in vars(utils)


def _status_of_a_cleared_room() -> bool:
    from sglang.srt.disaggregation.common.conn import CommonKVManager

    try:
        CommonKVManager.check_status(SimpleNamespace(request_status={}), 0)
    except KeyError:
        return False
    except AttributeError:
        return False  # changed beyond what this knows, which the check of seams is for
    return True


def _data_parallel_rank_of_a_room() -> bool:
    """Do senders look past the rank in attention data parallelism, which is 0 on all ranks without that?"""
    try:
        from sglang.srt.disaggregation.common.conn import CommonKVManager, CommonKVSender

        askers = (CommonKVSender.__init__, CommonKVSender._register_prefill_dp_rank)
    except (ImportError, AttributeError):
        return False  # changed beyond what this knows, which the check of seams is for
    names = [asker.__code__.co_names for asker in askers]
    return hasattr(CommonKVManager, "dp_rank") and all("dp_rank" in of_one for of_one in names)


_LOOKS: Mapping[str, Callable[[], bool]] = {
    STORAGE_REQUEST_HANDLE: _storage_request_handle,
    REGISTER_KV_CLASSES: _register_kv_classes,
    STATUS_OF_A_CLEARED_ROOM: _status_of_a_cleared_room,
    DATA_PARALLEL_RANK_OF_A_ROOM: _data_parallel_rank_of_a_room,
}
