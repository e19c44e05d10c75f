"""What of SGLang 0.5.23 this package relies on, each with what it is, why it is needed, and when it can go.

A seam is a dotted path to a class, function or method, or (``attribute``) the name of an attribute that a class's own
source sets. ``check`` resolves them all, so a renamed symbol stops the server with a sentence instead of showing as a
request that is never helped.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import pkgutil
from collections.abc import Iterable
from typing import NamedTuple

from sglang_dualpath.errors import SeamError

# The package's own requirement says the same; this holds where it was installed with --no-deps.
SUPPORTED_RELEASE = "0.5.23"


class Seam(NamedTuple):
    """One thing of SGLang's that is relied on."""

    path: str
    """Dotted path, resolvable with imports."""
    what: str
    why: str
    remove_when: str
    parameters: tuple[str, ...] = ()
    """Parameter names that our call or override depends on."""
    attribute: str | None = None
    """An attribute that instances of the class at ``path`` have."""

    @property
    def name(self) -> str:
        return f"{self.path}.{self.attribute}" if self.attribute else self.path


_SRT = "sglang.srt."
_TREE = _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache"
_CONTROLLER = _SRT + "mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController"
_BASE_CONTROLLER = _SRT + "managers.cache_controller.HiCacheController"
_SCHEDULER = _SRT + "managers.scheduler.Scheduler"
_PREALLOC = _SRT + "disaggregation.decode.DecodePreallocQueue"
_TRANSFER = _SRT + "disaggregation.decode.DecodeTransferQueue"
_COMMON = _SRT + "disaggregation.common.conn."
_HANDLE = "the HiCache storage interface carries the request handle"
_PLUGGABLE = "SGLang has a registry of KV connectors"
_OFFER = "a prefetch can be parked and reissued by upstream while the request bootstraps"

SEAMS: tuple[Seam, ...] = (
    # -- switch and arguments
    Seam(_SRT + "server_args.ServerArgs.add_cli_args", "flags", "adds --kv-connector", _PLUGGABLE, ("parser",)),
    Seam(_SRT + "server_args.ServerArgs.from_cli_args", "flags", "reads --kv-connector", _PLUGGABLE, ("args",)),
    Seam(
        _SRT + "arg_groups.resolution_hooks.register_resolution_hook",
        "argument resolution", "sets defaults and refuses combinations", "never: it is the official place", ("name",),
    ),
    Seam(
        _SRT + "arg_groups.overrides.declare_resolution",
        "argument resolution", "writes the defaults", "never: it is the official place", ("server_args", "source"),
    ),
    Seam(_SRT + "arg_groups.overrides.resolving_view", "argument resolution", "reads arguments", "as above"),
    Seam(
        _SRT + "mem_cache.registry.register_radix_cache_backend",
        "tree registry", "brings our trees in", "never: it is the official place", ("name", "factory"),
    ),
    Seam(
        _SRT + "mem_cache.registry.create_unified_radix_cache",
        "tree factory", "builds our subclass as upstream builds its tree", "never", ("ctx", "cache_class"),
    ),
    # -- scheduler
    Seam(_SCHEDULER, "scheduler class", "replaced by a subclass", "SGLang has request lifecycle callbacks"),
    Seam(_SCHEDULER + ".init_disaggregation", "queues and KV managers", "our side is built after them", "as above"),
    Seam(
        _SCHEDULER + "._prefetch_kvcache", "prefetch at arrival", "tells which room a prefetch belongs to", _HANDLE,
        ("req", "storage_hit_end"),
    ),
    Seam(
        _SCHEDULER + "._add_request_to_queue", "arrival", "starts the decode engine's read after acceptance",
        "as above", ("req", "is_retracted"),
    ),
    Seam(_SCHEDULER + "._process_hicache_events", "event loop", "parked prefetches are reissued here", _OFFER),
    # -- decode queues
    Seam(_PREALLOC, "decode queue class", "replaced by a subclass", "upstream locks the L2 prefix it promises"),
    Seam(
        _PREALLOC + "._build_decode_prefix_match", "decode prefix match", "notes the host node to lock", "as above",
        ("req", "result", "max_prefix_len"),
    ),
    Seam(
        _PREALLOC + "._start_hicache_prefetch", "decode admission", "locks the promised L2 prefix", "as above",
        ("req", "prefix_match"),
    ),
    Seam(_TRANSFER, "decode queue class", "replaced by a subclass", "a restore short of device memory waits upstream"),
    Seam(_TRANSFER + "._try_hicache_queue_load_back", "decode restore", "waits, not fails", "as above", ("dr",)),
    Seam(
        _TRANSFER + "._clean_hicache_prefetch_resources", "decode restore", "releases the lock on failure", "as above",
        ("decode_req",),
    ),
    # -- HiCache
    Seam(_CONTROLLER, "cache controller class", "replaced by a subclass", _HANDLE),
    Seam(_CONTROLLER + ".attach_storage_backend", "storage attach", "wraps the page getter and setter", _HANDLE),
    Seam(_CONTROLLER + "._page_transfer", "prefetch transfer", "knows when it is over", _HANDLE, ("operation",)),
    Seam(
        _CONTROLLER + "._storage_hit_query", "storage hit query", "adds pages that the decode engine holds",
        "hit queries are pluggable", ("operation",),
    ),
    Seam(_BASE_CONTROLLER, "page getter", "the seam of the read paths", _HANDLE, attribute="page_get_func"),
    Seam(_BASE_CONTROLLER, "page setter", "no write-back of known pages", _HANDLE, attribute="page_set_func"),
    Seam(_BASE_CONTROLLER, "stop event", "a getter returns on a flush", _HANDLE, attribute="storage_stop_event"),
    Seam(_BASE_CONTROLLER, "host pool", "the pages that hops write to", "never", attribute="storage_host_pool"),
    Seam(_TREE, "tree class", "our trees are subclasses", "the tree calls back on prefetch events"),
    Seam(
        _TREE + ".prefetch_from_storage", "prefetch submission", "learns of declined prefetches", "as above",
        ("request", "last_host_node_id", "new_input_tokens", "matched_prefix_tokens", "storage_hit_end"),
    ),
    Seam(_TREE + ".revoke_pending_prefetch", "prefetch revocation", "parks and declines", "as above", ("request",)),
    Seam(_TREE + "._handle_prefetch_result", "prefetch insertion", "locks its pages", "as above", ("operation",)),
    Seam(_TREE + ".check_hicache_events", "event check", "opens reads, once a tick", "as above"),
    Seam(_TREE + ".release_aborted_request", "abort", "ends reads", "as above", ("request",)),
    Seam(_TREE + ".query_storage_hit_length", "decode hit query", "nothing of storage is promised", "as above"),
    Seam(_TREE + ".inc_host_lock_ref", "host locks", "keeps promised pages", "never", ("node_id",)),
    Seam(_TREE + ".dec_host_lock_ref", "host locks", "releases them", "never", ("node_id", "params")),
    Seam(_TREE + ".reset", "flush", "the reserve is taken again", "as above"),
    Seam(_TREE, "prefetches", "finds operations with host pages", "as above", attribute="ongoing_prefetch"),
    Seam(_SRT + "mem_cache.common._req_radix_key", "match key", "matches without touching the request", "never"),
    # -- connector
    Seam(
        _SRT + "disaggregation.utils.get_kv_class", "connector factory", "returns our subclasses", _PLUGGABLE,
        ("transfer_backend", "class_type"),
    ),
    Seam(_COMMON + "CommonKVReceiver.poll", "receiver status", "Bootstrapping until the read settled", "as above"),
    Seam(_COMMON + "CommonKVReceiver.clear", "receiver end", "learns of dropped requests", "as above"),
    Seam(_COMMON + "CommonKVBootstrapServer._setup_routes", "bootstrap routes", "publishes endpoints", _PLUGGABLE),
    Seam(_COMMON + "CommonKVManager", "address", "the control socket binds it", "never", attribute="local_ip"),
    Seam(_COMMON + "CommonKVManager", "bootstrap host", "publishes there", "never", attribute="bootstrap_host"),
    Seam(_COMMON + "CommonKVManager", "bootstrap port", "publishes there", "never", attribute="bootstrap_port"),
    Seam(
        _SRT + "distributed.device_communicators.mooncake_transfer_engine.MooncakeTransferEngine.batch_transfer_sync",
        "push", "the hop", "never", ("session_id", "buffers", "peer_buffer_addresses", "lengths"),
    ),
)  # fmt: skip


def check(seams: Iterable[Seam] = SEAMS) -> None:
    """Raise SeamError, naming them, unless SGLang is the supported release and has every seam."""
    release = importlib.metadata.version("sglang")
    if release.split("+")[0].split(".post")[0] != SUPPORTED_RELEASE:
        raise SeamError(
            f"sglang_dualpath works with SGLang {SUPPORTED_RELEASE}, and {release} is installed; install the release "
            "of sglang_dualpath that names it, or drop --kv-connector."
        )
    missing = [problem for seam in seams if (problem := _problem(seam)) is not None]
    if missing:
        raise SeamError(
            f"SGLang {release} lacks what sglang_dualpath hooks into ({'; '.join(missing)}), changed by a patch or "
            "another plugin; install stock SGLang, or drop --kv-connector."
        )


def _problem(seam: Seam) -> str | None:
    try:
        found = pkgutil.resolve_name(seam.path)
    except (ImportError, AttributeError):
        return f"{seam.name} is missing"
    if seam.attribute is not None:
        sources = (inspect.getsource(cls) for cls in inspect.getmro(found) if cls.__module__.startswith("sglang"))
        return None if any(f"self.{seam.attribute}" in source for source in sources) else f"{seam.name} is missing"
    if seam.parameters:
        known = inspect.signature(inspect.unwrap(found)).parameters
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
        lost = [name for name in seam.parameters if name not in known]
        if lost and not takes_any:
            return f"{seam.name} has no parameter {', '.join(lost)}"
    return None
