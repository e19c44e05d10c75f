"""What a patched or later SGLang offers by itself. Where it does, the hook that stands in for it here is not used.

Each name is that of a patch in ``patches/``, which says what it adds and why. Looked at in the process that asks: the
installed source decides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Final

logger = logging.getLogger(__name__)

STORAGE_REQUEST_HANDLE: Final = "hicache-storage-request-handle"
REGISTER_KV_CLASSES: Final = "register-kv-classes"
STATUS_OF_A_CLEARED_ROOM: Final = "status-of-a-cleared-room"


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
    """Asked for the hits of a request, is the store told which one? A field alone, of half a patch, is not enough."""
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

    told: list[Any] = []
    request = object()

    def hits(keys: Any, extra_info: Any) -> int:
        del keys
        told.append(vars(extra_info).get("handle"))
        return 0

    controller = SimpleNamespace(page_size=1, storage_backend=SimpleNamespace(batch_exists=hits))
    result = SimpleNamespace(update_kv_hit_pages=lambda pages: None)
    operation = SimpleNamespace(
        handle=request, token_ids=[1], last_hash="", assume_stored=False, prefix_keys=None, pool_transfers=None,
        pool_storage_result=result,
    )  # fmt: skip
    try:
        HybridCacheController._storage_hit_query(controller, operation)
    except Exception:
        return False  # changed beyond what this knows
    return told == [request]


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


_LOOKS: Mapping[str, Callable[[], bool]] = {
    STORAGE_REQUEST_HANDLE: _storage_request_handle,
    REGISTER_KV_CLASSES: _register_kv_classes,
    STATUS_OF_A_CLEARED_ROOM: _status_of_a_cleared_room,
}
