"""Which classes and functions of SGLang are replaced or wrapped once the switch is on, and the check that they were.

SGLang's hook registry logs and swallows a hook that could not be applied, so ``verify`` looks, and stops the server.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from sglang.srt.mem_cache.registry import (
    create_unified_radix_cache,
    get_radix_cache_factory,
    register_radix_cache_backend,
)
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_dualpath.errors import DualPathError, SeamError

TREE_BACKEND = "dualpath"

_GET_KV_CLASS = "sglang.srt.disaggregation.utils.get_kv_class"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_PREALLOC = "sglang.srt.disaggregation.decode.DecodePreallocQueue"
_TRANSFER = "sglang.srt.disaggregation.decode.DecodeTransferQueue"
_CONTROLLER = "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController"
REPLACED = (_SCHEDULER, _PREALLOC, _TRANSFER, _CONTROLLER)


class Replacements(NamedTuple):
    """Our classes in SGLang's places."""

    scheduler: type
    prealloc_queue: type
    transfer_queue: type
    controller: type
    kv_classes: Mapping[type, type]
    """Connector classes of SGLang's, and ours for them."""
    trees: Mapping[str, type]
    """Radix trees by ``--disaggregation-mode``."""


def install(ours: Replacements) -> None:
    """Register every hook of a server whose switch is on. SGLang applies them; see :func:`verify`."""
    HookRegistry.register(_GET_KV_CLASS, functools.partial(_our_kv_class, ours.kv_classes), HookType.AROUND)
    HookRegistry.register(_SCHEDULER, ours.scheduler, HookType.REPLACE)
    HookRegistry.register(_PREALLOC, ours.prealloc_queue, HookType.REPLACE)
    HookRegistry.register(_TRANSFER, ours.transfer_queue, HookType.REPLACE)
    HookRegistry.register(_CONTROLLER, ours.controller, HookType.REPLACE)
    if get_radix_cache_factory(TREE_BACKEND) is None:
        register_radix_cache_backend(TREE_BACKEND, functools.partial(_create_tree, ours.trees))


def verify() -> None:
    """Raise SeamError unless every hook was applied."""
    missing = [target for target in (_GET_KV_CLASS, *REPLACED) if target not in HookRegistry._patched]
    if missing:
        raise SeamError(
            f"SGLang could not apply the hooks of sglang_dualpath on {', '.join(missing)}; see the log above for the "
            "reason, or drop --kv-connector."
        )


def _create_tree(trees: Mapping[str, type], ctx: Any) -> Any:
    """SGLang's tree factory. Runs in every scheduler process, so this is where hooks are verified there."""
    from sglang.srt.runtime_context import get_disagg

    stop_on_error(verify)
    if ctx.is_hybrid_swa or ctx.is_hybrid_ssm or ctx.is_dsa:
        kind = "sliding-window" if ctx.is_hybrid_swa else "Mamba" if ctx.is_hybrid_ssm else "DSA"
        stop(f"--kv-connector dualpath does not support {kind} models yet: their cache has more than one pool.")
    return create_unified_radix_cache(ctx, cache_class=trees[get_disagg().disaggregation_mode])


def _our_kv_class(kv_classes: Mapping[type, type], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    found = original(*args, **kwargs)
    return kv_classes.get(found, found)


def stop(sentence: str) -> NoReturn:
    """End the process with one sentence. SGLang logs a plugin's exceptions and goes on, but lets this one through."""
    print(sentence, file=sys.stderr, flush=True)
    raise SystemExit(1)


def stop_on_error(check: Callable[[], None]) -> None:
    """Run ``check`` and end the process with its sentence if it raises one of our errors."""
    try:
        check()
    except DualPathError as error:
        stop(str(error))
