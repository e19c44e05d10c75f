"""Which classes and functions of SGLang are replaced or wrapped once the switch is on, and the check that they were.

SGLang's hook registry logs and swallows a hook that could not be applied, and lets the last plugin win that replaces a
class, so ``verify`` looks at what is there in the end, and stops the server.
"""

from __future__ import annotations

import contextlib
import functools
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sglang.srt.mem_cache.registry import (
    create_unified_radix_cache,
    get_radix_cache_factory,
    register_radix_cache_backend,
)
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_dualpath.compat import native, prometheus, seams
from sglang_dualpath.compat.catalogue import CONNECTOR_SEAMS
from sglang_dualpath.compat.stop import stop, stop_on_error
from sglang_dualpath.errors import SeamError

TREE_BACKEND = "dualpath"

GET_KV_CLASS = "sglang.srt.disaggregation.utils.get_kv_class"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
PREALLOC_QUEUE = "sglang.srt.disaggregation.decode.DecodePreallocQueue"
TRANSFER_QUEUE = "sglang.srt.disaggregation.decode.DecodeTransferQueue"
CONTROLLER = "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController"

__all__ = ["CONTROLLER", "GET_KV_CLASS", "PREALLOC_QUEUE", "SCHEDULER", "TRANSFER_QUEUE", "TREE_BACKEND",
           "Replacements", "install", "stop", "stop_on_error", "verify", "verify_connector"]  # fmt: skip


class Replacements(NamedTuple):
    """Our classes in SGLang's places."""

    scheduler: type
    prealloc_queue: type
    transfer_queue: type
    controller: type
    kv_classes: Callable[[str], Mapping[type, type]]
    """Connector classes of SGLang's, and ours for them, by the name of the transfer backend."""
    trees: Mapping[str, type]
    """Radix trees by ``--disaggregation-mode``."""

    @property
    def classes(self) -> dict[str, type]:
        """Our classes by the dotted path of SGLang's that they replace."""
        return {
            SCHEDULER: self.scheduler,
            PREALLOC_QUEUE: self.prealloc_queue,
            TRANSFER_QUEUE: self.transfer_queue,
            CONTROLLER: self.controller,
        }


def install(ours: Replacements) -> None:
    """Register every hook of a server whose switch is on. SGLang applies them; see :func:`verify`."""
    if native.has(native.REGISTER_KV_CLASSES):
        _register_kv_classes(ours)
    else:
        HookRegistry.register(GET_KV_CLASS, functools.partial(_our_kv_class, ours.kv_classes), HookType.AROUND)
    for target, replacement in ours.classes.items():
        HookRegistry.register(target, replacement, HookType.REPLACE)
    if get_radix_cache_factory(TREE_BACKEND) is None:
        register_radix_cache_backend(TREE_BACKEND, functools.partial(_create_tree, ours))


def verify(ours: Replacements) -> None:
    """Raise SeamError unless every hook was applied and is in force."""
    hooked = [*ours.classes] if native.has(native.REGISTER_KV_CLASSES) else [GET_KV_CLASS, *ours.classes]
    missing = [target for target in hooked if target not in HookRegistry._patched]
    if missing:
        raise SeamError(
            f"SGLang could not apply the hooks of sglang_dualpath on {', '.join(missing)}; see the log above for the "
            "reason, or drop --kv-connector."
        )
    lost = [target for target, cls in ours.classes.items() if not _is_in_force(target, cls)]
    if lost:
        raise _changed_too(lost)


def verify_connector(ours: Replacements, backend: str) -> None:
    """Raise SeamError unless SGLang has what our connector for ``backend`` relies on, and makes its classes."""
    with prometheus.undecided():
        seams.check(CONNECTOR_SEAMS[backend])
        in_force = _kv_classes_in_force(backend, ours.kv_classes(backend))
    if not in_force:
        raise _changed_too([GET_KV_CLASS])


def _changed_too(targets: list[str]) -> SeamError:
    return SeamError(
        f"Another plugin changed {', '.join(targets)} too, so --kv-connector dualpath would be without effect; "
        "name the plugins to load in SGLANG_PLUGINS, or drop --kv-connector."
    )


def _is_in_force(target: str, cls: type) -> bool:
    found = pkgutil.resolve_name(target)
    return isinstance(found, type) and issubclass(found, cls)


def _kv_classes_in_force(backend: str, kv_classes: Mapping[type, type]) -> bool:
    from sglang.srt.disaggregation.utils import KVClassType, TransferBackend, get_kv_class

    wanted = (KVClassType.MANAGER, KVClassType.RECEIVER, KVClassType.BOOTSTRAP_SERVER)
    found = {get_kv_class(TransferBackend(backend), kind) for kind in wanted}
    return found == set(kv_classes.values())


def _create_tree(ours: Replacements, ctx: Any) -> Any:
    """SGLang's tree factory. Runs in every scheduler process, so this is where hooks are verified there."""
    from sglang.srt.runtime_context import get_disagg

    stop_on_error(functools.partial(verify, ours))
    stop_on_error(functools.partial(verify_connector, ours, get_disagg().disaggregation_transfer_backend))
    native.log()
    if ctx.is_hybrid_swa or ctx.is_hybrid_ssm or ctx.is_dsa:
        kind = "sliding-window" if ctx.is_hybrid_swa else "Mamba" if ctx.is_hybrid_ssm else "DSA"
        stop(
            f"--kv-connector dualpath does not support {kind} models: their cache has pages that are not read "
            "together with the KV pages."
        )
    return create_unified_radix_cache(ctx, cache_class=ours.trees[get_disagg().disaggregation_mode])


def _register_kv_classes(ours: Replacements) -> None:
    for backend in CONNECTOR_SEAMS:
        # Where another plugin was first, it matters for the backend in use alone: see verify_connector.
        with contextlib.suppress(ValueError):
            native.register_kv_classes(backend, functools.partial(_by_type, ours.kv_classes, backend))


def _by_type(kv_classes: Callable[[str], Mapping[type, type]], backend: str) -> dict[Any, type]:
    """Our classes of a transfer backend by what each of them is."""
    from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer, CommonKVManager, CommonKVReceiver
    from sglang.srt.disaggregation.utils import KVClassType

    bases = {KVClassType.MANAGER: CommonKVManager, KVClassType.RECEIVER: CommonKVReceiver,
             KVClassType.BOOTSTRAP_SERVER: CommonKVBootstrapServer}  # fmt: skip
    ours = kv_classes(backend).values()
    return {kind: cls for kind, base in bases.items() for cls in ours if issubclass(cls, base)}


def _our_kv_class(
    kv_classes: Callable[[str], Mapping[type, type]], original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    found = original(*args, **kwargs)
    backend = kwargs["transfer_backend"] if "transfer_backend" in kwargs else args[0]
    return kv_classes(backend.value).get(found, found)
