"""Every name of SGLang 0.5.23 that this package imports, overrides, wraps or reads; see ``seams``.

`SEAMS` are needed by every server, those of `CONNECTOR_SEAMS` by servers with that transfer backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sglang_dualpath.compat import native
from sglang_dualpath.compat.seams import Seam

_SRT = "sglang.srt."
_ARGS = _SRT + "server_args.ServerArgs"
_STEPS = _SRT + "arg_groups."
_REGISTRY = _SRT + "mem_cache.registry."
_TREE = _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache"
_CORE = _SRT + "mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface"
_CONTROLLER = _SRT + "mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController"
_OPERATION = _SRT + "mem_cache.hybrid_cache.hybrid_cache_controller.PrefetchOperation"
_SCHEDULER = _SRT + "managers.scheduler.Scheduler"
_REQUEST = _SRT + "managers.schedule_batch.Req"
_DISAGG = _SRT + "disaggregation."
_PREALLOC = _DISAGG + "decode.DecodePreallocQueue"
_TRANSFER = _DISAGG + "decode.DecodeTransferQueue"
_DECODE_REQUEST = _DISAGG + "decode.DecodeRequest"
_MATCH = _DISAGG + "decode_hicache_mixin.DecodePrefixMatch"
_COMMON = _DISAGG + "common.conn."
_MOONCAKE = _DISAGG + "mooncake"
_NIXL = _DISAGG + "nixl"
_ENGINE = _SRT + "distributed.device_communicators.mooncake_transfer_engine.MooncakeTransferEngine"
_STORE = _SRT + "mem_cache.storage.mooncake_store.mooncake_store.MooncakeStoreConfig"

_OFFICIAL = "never: it is the official place"
_PLUGGABLE = "SGLang has a registry of KV connectors"
_HANDLE = "the HiCache storage interface carries the request handle"
_BACKEND = "it does, and reads of a request may come in any order: then the read paths are a storage backend"
_EVENTS = "the tree calls back on prefetch events"
_LIFECYCLE = "SGLang has request lifecycle callbacks"
_PARKING = "a prefetch can be parked and reissued by upstream while the request bootstraps"
_LOCKING = "upstream locks the host prefix it promises"
_WAITING = "a restore short of device memory waits upstream"
_WITH_OURS = "its user here goes"
_RANK_OF_A_ROOM = "senders name the rank that the bootstrap server files an engine under"


def _attributes(path: str, names: str, what: str, why: str, remove_when: str) -> Iterator[Seam]:
    for name in names.split():
        yield Seam(path, what, why, remove_when, attribute=name)


def _methods(path: str, names: str, what: str, why: str, remove_when: str) -> Iterator[Seam]:
    for name in names.split():
        yield Seam(f"{path}.{name}", what, why, remove_when)


SEAMS: tuple[Seam, ...] = (
    # -- switch and arguments
    Seam(_ARGS + ".add_cli_args", "flags", "adds --kv-connector", _PLUGGABLE, ("parser",)),
    Seam(_ARGS + ".from_cli_args", "flags", "reads --kv-connector", _PLUGGABLE, ("args",)),
    Seam(_SRT + "plugins.hook_registry.HookRegistry.register", "hooks", "registers ours", _OFFICIAL,
         ("target", "hook", "hook_type")),
    Seam(_SRT + "plugins.hook_registry.HookRegistry.apply_hooks", "hooks", "applies ours after the flags", _OFFICIAL),
    Seam(_SRT + "plugins.hook_registry.HookRegistry._patched", "hooks that were applied",
         "a hook that could not be applied is only logged", "a failed hook of a plugin can stop the server"),
    Seam(_SRT + "plugins.hook_registry.HookType", "hooks", "registers ours", _OFFICIAL),
    Seam(_STEPS + "resolution_hooks.register_resolution_hook", "argument resolution",
         "sets defaults and refuses combinations", _OFFICIAL, ("name",)),
    Seam(_STEPS + "parallel_hook.handle_deprecated_dp_attention", "first step of resolution",
         "refuses before SGLang's own checks end in a traceback", _OFFICIAL, ("server_args",)),
    Seam(_STEPS + "pd_disaggregation_hook.handle_pd_disaggregation", "step of resolution", "sets defaults before it",
         _OFFICIAL, ("server_args",)),
    Seam(_STEPS + "serving_hook.handle_other_validations", "late step of resolution",
         "refuses and warns by what was resolved", _OFFICIAL, ("server_args",)),
    Seam(_STEPS + "overrides.declare_resolution", "argument resolution", "writes the defaults", _OFFICIAL,
         ("server_args", "source")),
    Seam(_STEPS + "overrides.resolving_view", "argument resolution", "reads arguments", _OFFICIAL, ("server_args",)),
    Seam(_STEPS + "overrides.resolved_view", "argument resolution", "reads arguments", _OFFICIAL, ("server_args",)),
    *_methods(
        _ARGS,
        "attn_cp_size attn_dp_size dcp_size decoupled_spec_role disable_radix_cache dp_size"
        " disaggregation_decode_allocation_policy disaggregation_decode_enable_offload_kvcache"
        " disaggregation_decode_enable_radix_cache"
        " disaggregation_decode_host_receive_threshold disaggregation_ib_device disaggregation_mode"
        " disaggregation_transfer_backend enable_dp_attention enable_flexkv enable_hierarchical_cache"
        " enable_hisparse enable_kv_cache_sharding enable_linker_mla_dedup enable_lmcache enable_pd_role_switch"
        " enable_unified_cache_external_linker encoder_only hicache_host_memory_mode hicache_mem_layout hicache_ratio"
        " hicache_size hicache_storage_backend hicache_storage_backend_extra_config hicache_storage_prefetch_policy"
        " language_only pp_size radix_cache_backend speculative_algorithm use_ray",
        "server argument", "sets a default or refuses a value", "the argument or the refusal goes",
    ),
    Seam(_SRT + "environ.envs", "environment settings", "refuses the Rust server, finds the store", _WITH_OURS),
    Seam(_STORE + ".load_from_extra_config", "store settings", "warns about shared NICs", _WITH_OURS,
         ("extra_config",)),
    Seam(_STORE + ".from_file", "store settings", "warns about shared NICs", _WITH_OURS),
    Seam(_STORE + ".load_from_env", "store settings", "warns about shared NICs", _WITH_OURS),
    *_attributes(_STORE, "global_segment_size protocol device_name", "store settings", "warns about shared NICs",
                 _WITH_OURS),
    Seam(_STORE, "store settings", "refuses data-parallel ranks that overwrite each other's pages", _WITH_OURS,
         attribute="enable_ssd_offload"),
    # -- tree registry
    Seam(_REGISTRY + "register_radix_cache_backend", "tree registry", "brings our trees in", _OFFICIAL,
         ("name", "factory")),
    Seam(_REGISTRY + "get_radix_cache_factory", "tree registry", "does not bring them in twice", _OFFICIAL, ("name",)),
    Seam(_REGISTRY + "create_unified_radix_cache", "tree factory", "builds our subclass as upstream builds its tree",
         "never", ("ctx", "cache_class")),
    *_attributes(_REGISTRY + "TreeCacheBuildContext", "is_hybrid_swa is_hybrid_ssm is_dsa", "kind of model",
                 "refuses caches with more pools", "such models are supported"),
    Seam(_SRT + "runtime_context.get_disagg", "resolved arguments", "picks the tree of the role", _OFFICIAL),
    # -- scheduler
    Seam(_SCHEDULER, "scheduler class", "replaced by a subclass", _LIFECYCLE),
    Seam(_SCHEDULER + ".init_disaggregation", "queues and KV managers", "our side is built after them", _LIFECYCLE),
    Seam(_SCHEDULER + "._prefetch_kvcache", "prefetch at arrival",
         "tells which room a prefetch belongs to, and reissues", _BACKEND, ("req", "storage_hit_end")),
    Seam(_SCHEDULER + "._add_request_to_queue", "arrival", "starts the decode engine's read after acceptance",
         _LIFECYCLE, ("req", "is_retracted")),
    Seam(_SCHEDULER + "._process_hicache_events", "event loop", "parked prefetches are reissued here", _PARKING),
    *_attributes(_SCHEDULER, "disaggregation_mode tree_cache disagg_prefill_bootstrap_queue"
                 " disagg_decode_prealloc_queue",
                 "parts of the scheduler", "our side is built from them", _LIFECYCLE),
    Seam(_SCHEDULER, "ranks of the server", "they agree on what each decides by clock or message", "never",
         attribute="attn_tp_cpu_group"),
    *_attributes(_REQUEST, "bootstrap_room bootstrap_host cache_request_handle origin_input_ids extra_key cache_salt"
                 " rid pending_bootstrap", "a request", "names its room and what it asks for", _LIFECYCLE),
    Seam(_DISAGG + "utils.DisaggregationMode", "role", "picks the side", _LIFECYCLE),
    Seam(_DISAGG + "utils.FAKE_BOOTSTRAP_HOST", "warm-up requests", "they have no room of their own", _LIFECYCLE),
    # -- decode queues
    Seam(_PREALLOC, "decode queue class", "replaced by a subclass", _LOCKING),
    Seam(_PREALLOC + "._build_decode_prefix_match", "decode prefix match", "notes the host node to lock", _LOCKING,
         ("req", "result", "max_prefix_len")),
    Seam(_PREALLOC + "._start_hicache_prefetch", "decode admission", "locks the promised host prefix", _LOCKING,
         ("req", "prefix_match")),
    *_attributes(_PREALLOC, "queue kv_manager tree_cache", "parts of the queue", "finds accepted requests", _LIFECYCLE),
    Seam(_DISAGG + "prefill.PrefillBootstrapQueue", "prefill queue", "holds requests whose prefetch is parked",
         _PARKING, attribute="queue"),
    Seam(_DISAGG + "prefill.PrefillBootstrapQueue", "prefill queue", "has the KV manager", _PLUGGABLE,
         attribute="kv_manager"),
    Seam(_TRANSFER, "decode queue class", "replaced by a subclass", _WAITING),
    Seam(_TRANSFER + "._try_hicache_queue_load_back", "decode restore", "waits, does not fail", _WAITING, ("dr",)),
    Seam(_TRANSFER + "._clean_hicache_prefetch_resources", "decode restore", "releases the lock on failure", _LOCKING,
         ("decode_req",)),
    *_attributes(_DECODE_REQUEST, "req kv_receiver is_rebootstrap prefix_match hicache_restore_status",
                 "a request in the decode queues", "finds its lock and its restore", _LOCKING),
    Seam(_MATCH, "decode prefix match", "says whether a host prefix is promised", _LOCKING,
         attribute="l2_host_hit_length"),
    *_methods(_DISAGG + "decode_hicache_mixin.HiCacheRestoreResult", "FAILED PENDING", "decode restore",
              "tells a shortage", _WAITING),
    Seam(_DISAGG + "decode_hicache_mixin.HiCacheRestoreResult", "decode restore", "tells a shortage", _WAITING),
    # -- HiCache controller
    Seam(_CONTROLLER, "cache controller class", "replaced by a subclass", _BACKEND),
    Seam(_CONTROLLER + ".attach_storage_backend", "storage attach", "wraps the page getter and setter", _BACKEND),
    Seam(_CONTROLLER + "._page_transfer", "prefetch transfer", "knows when it is over", _BACKEND, ("operation",)),
    Seam(_CONTROLLER + "._storage_hit_query", "storage hit query", "adds pages that the decode engine holds",
         _HANDLE, ("operation",), native=native.STORAGE_REQUEST_HANDLE),
    Seam(_SRT + "managers.cache_controller.HiCacheController", "storage reads",
         "looked at: do they tell the store whose they are?", _HANDLE),
    Seam(_SRT + "mem_cache.hicache_storage.HiCacheStorage.batch_exists", "store's hit query",
         "the same, where the store is told whose hits it asks for", _BACKEND, ("keys", "extra_info")),
    Seam(_CONTROLLER + ".allocate_storage_hit", "host pages of a prefetch", "waits for all of them at decode", _PARKING,
         ("operation", "hit_tokens", "allow_partial")),
    Seam(_CONTROLLER + ".prefetch_rate_limited", "prefetch rate limit", "parks what is declined for now", _PARKING),
    Seam(_CONTROLLER + ".parse_storage_backend_extra_config", "store settings", "reads them as SGLang does",
         _WITH_OURS, ("storage_backend_extra_config",)),
    Seam(_CONTROLLER, "page getter", "the seam of the read paths", _BACKEND, attribute="page_get_func"),
    Seam(_CONTROLLER, "page setter", "no write-back of known pages", _BACKEND, attribute="page_set_func"),
    Seam(_CONTROLLER, "stop event", "a getter returns on a flush", _BACKEND, attribute="storage_stop_event"),
    Seam(_CONTROLLER, "host pool", "the pages that hops write to", "never", attribute="storage_host_pool"),
    Seam(_CONTROLLER, "host pool", "the reserve is taken from it", "never", attribute="mem_pool_host"),
    Seam(_CONTROLLER, "store", "asks for known pages", _BACKEND, attribute="storage_backend"),
    Seam(_CONTROLLER, "store", "knows which several threads may read", _BACKEND, attribute="storage_backend_type"),
    Seam(_CONTROLLER, "page size", "counts pages", "never", attribute="page_size"),
    Seam(_SRT + "mem_cache.hicache_storage.STORAGE_BATCH_SIZE", "pages at a time", "a store is asked for no more",
         _BACKEND),
    Seam(_SRT + "mem_cache.hicache_storage.HiCacheStorageExtraInfo", "getter's argument", "reads out of order",
         _BACKEND,
         ("prefix_keys",)),
    Seam(_OPERATION + ".is_terminated", "prefetch", "a getter returns on an abort", _BACKEND),
    *_attributes(
        _OPERATION,
        "handle hash_value host_indices storage_start storage_hit_count prefix_keys assume_stored all_hash_values"
        " pool_transfers",
        "prefetch", "what is read, and where to", _BACKEND,
    ),
    # -- trees
    Seam(_TREE, "tree class", "our trees are subclasses", _EVENTS),
    Seam(_TREE + ".prefetch_from_storage", "prefetch submission", "learns of declined prefetches", _EVENTS,
         ("request", "last_host_node_id", "new_input_tokens", "matched_prefix_tokens", "storage_hit_end")),
    Seam(_TREE + ".revoke_pending_prefetch", "prefetch revocation", "parks and declines", _EVENTS, ("request",)),
    Seam(_TREE + "._handle_prefetch_result", "prefetch insertion", "locks its pages", _EVENTS, ("operation",)),
    Seam(_TREE + ".check_hicache_events", "event check", "opens reads, once a tick", _EVENTS),
    Seam(_TREE + ".release_aborted_request", "abort", "ends reads", _LIFECYCLE, ("request",)),
    Seam(_TREE + ".finish", "end of a request", "ends the prefetch of a dropped one", _LIFECYCLE),
    Seam(_TREE + ".query_storage_hit_length", "decode hit query", "nothing of storage is promised", _EVENTS),
    Seam(_TREE + ".reset", "flush", "the reserve is taken again", _EVENTS),
    Seam(_TREE + ".match_prefix", "match", "what is held, without touching the request", "never", ("params",)),
    Seam(_TREE + ".inc_host_lock_ref", "host locks", "keeps promised pages", "never", ("node_id",)),
    Seam(_TREE + ".dec_host_lock_ref", "host locks", "releases them", "never", ("node_id", "params")),
    *_methods(_TREE, "is_backuped is_root get_last_hash_value get_prefix_hash_values", "tree nodes",
              "a prefetch continues a node", "never"),
    *_methods(_TREE, "has_ongoing_prefetch pop_prefetch_loaded_tokens", "prefetches", "follows a prefetch", _EVENTS),
    *_attributes(_TREE, "ongoing_prefetch prefetch_threshold hicache_storage_pass_prefix_keys", "prefetches",
                 "submits as upstream does, and finds operations with host pages", _EVENTS),
    Seam(_TREE, "write-through", "a page whose copy to host memory is not acknowledged is not named as held", "never",
         attribute="ongoing_write_through"),
    Seam(_SRT + "mem_cache.unified_radix_cache._OngoingWriteThrough", "write-through", "which nodes are copied",
         "never", attribute="publish_node_ids"),
    Seam(_TREE, "restore threshold", "small promised prefixes are restored too", _WAITING,
         attribute="load_back_threshold"),
    *_attributes(_TREE, "cache_controller tree_core", "parts of the tree", "our side is built from them", "never"),
    Seam(_TREE, "side pools", "refuses models that have some", "such models are supported",
         attribute="sidecar_pool_specs"),
    Seam(_CORE + ".collect_path_info", "tree nodes", "lists pages held in host memory", "never"),
    Seam(_CORE + ".build_storage_backup_spec", "tree nodes", "slots and hashes of a node's host pages", "never",
         ("node_id",)),
    Seam(_SRT + "mem_cache.common._req_radix_key", "match key", "matches without touching the request", "never"),
    Seam(_SRT + "mem_cache.base_prefix_cache.MatchPrefixParams", "match", "matches without touching the request",
         "never", ("key", "cow_mamba")),
    Seam(_SRT + "mem_cache.base_prefix_cache.CacheRequestOutcome", "end of a request", "says that it was dropped",
         _LIFECYCLE),
    # -- connector
    Seam(_DISAGG + "utils.get_kv_class", "connector factory", "returns our subclasses", _PLUGGABLE,
         ("transfer_backend", "class_type")),
    Seam(_DISAGG + "utils.KVClassType", "connector factory", "checks that it does", _PLUGGABLE),
    Seam(_DISAGG + "utils.TransferBackend", "connector factory", "checks that it does", _PLUGGABLE),
    Seam(_DISAGG + "base.KVPoll", "status of a transfer", "Bootstrapping until the read settled", _PLUGGABLE),
    Seam(_COMMON + "CommonKVReceiver", "connector class", "base of our receivers", _PLUGGABLE),
    Seam(_COMMON + "CommonKVReceiver.init", "receiver start", "learns which data-parallel rank has the request",
         _PLUGGABLE, ("prefill_dp_rank",)),
    Seam(_COMMON + "CommonKVReceiver.poll", "receiver status", "Bootstrapping until the read settled", _PLUGGABLE),
    Seam(_COMMON + "CommonKVReceiver.clear", "receiver end", "learns of dropped requests", _PLUGGABLE),
    *_attributes(_COMMON + "CommonKVReceiver",
                 "init_time kv_mgr bootstrap_room bootstrap_addr prefill_dp_rank prefill_info",
                 "a receiver",
                 "finds its request's read", _PLUGGABLE),
    Seam(_COMMON + "CommonKVBootstrapServer", "connector class", "base of our bootstrap servers", _PLUGGABLE),
    Seam(_COMMON + "CommonKVBootstrapServer._setup_routes", "bootstrap routes", "publishes endpoints", _PLUGGABLE),
    Seam(_COMMON + "CommonKVBootstrapServer", "bootstrap routes", "publishes endpoints", _PLUGGABLE, attribute="app"),
    Seam(_COMMON + "CommonKVManager", "connector class", "base of our managers", _PLUGGABLE),
    *_attributes(_COMMON + "CommonKVManager", "attn_tp_rank attn_tp_size system_dp_rank", "ranks",
                 "engines of equal rank speak to each other", "never"),
    Seam(_COMMON + "CommonKVManager", "data-parallel rank",
         "senders name it to decode servers, and it is 0 on all ranks without attention data parallelism",
         _RANK_OF_A_ROOM, attribute="attn_dp_rank", native=native.DATA_PARALLEL_RANK_OF_A_ROOM),
    Seam(_COMMON + "CommonKVManager", "data-parallel ranks", "says whether that is so", _RANK_OF_A_ROOM,
         attribute="system_dp_size"),
    Seam(_COMMON + "CommonKVSender._register_prefill_dp_rank", "rank of a room",
         "looked at: which rank do senders name?", _RANK_OF_A_ROOM),
    Seam(_COMMON + "CommonKVManager", "address", "the control socket binds it", "never", attribute="local_ip"),
    *_attributes(_COMMON + "CommonKVManager", "bootstrap_host bootstrap_port dist_init_addr", "bootstrap server",
                 "endpoints are published there", _PLUGGABLE),
    Seam(_COMMON + "CommonKVManager", "patience", "a restore waits as long as a transfer", _WAITING,
         attribute="waiting_timeout"),
)  # fmt: skip

_MOONCAKE_SEAMS: tuple[Seam, ...] = (
    *_methods(_MOONCAKE, "MooncakeKVManager MooncakeKVReceiver MooncakeKVBootstrapServer", "connector classes",
              "replaced by subclasses", _PLUGGABLE),
    Seam(_MOONCAKE + ".MooncakeKVManager", "transfer engine", "the hop uses it too", "never", attribute="engine"),
    Seam(_COMMON + "CommonKVManager.check_status", "status of a transfer",
         "upstream's transfer worker ends with a KeyError when its room is cleared while it looks",
         "upstream's worker survives that", ("bootstrap_room",), native=native.STATUS_OF_A_CLEARED_ROOM),
    Seam(_COMMON + "CommonKVManager", "status of a transfer", "read where check_status reads it",
         "upstream's worker survives a cleared room", attribute="request_status",
         native=native.STATUS_OF_A_CLEARED_ROOM),
    Seam(_ENGINE + ".batch_transfer_sync", "push", "the hop", "never",
         ("session_id", "buffers", "peer_buffer_addresses", "lengths")),
    *_methods(_ENGINE, "get_session_id register deregister", "registered memory", "the hop", "never"),
)  # fmt: skip

# NIXL's own calls are not here: they are NIXL's, and public.
_NIXL_SEAMS: tuple[Seam, ...] = (
    *_methods(_NIXL, "NixlKVManager NixlKVReceiver NixlKVBootstrapServer", "connector classes",
              "replaced by subclasses", _PLUGGABLE),
    Seam(_NIXL + ".NixlKVManager", "NIXL agent, one that serialises calls", "the hop uses it too", "never",
         attribute="agent"),
)  # fmt: skip

CONNECTOR_SEAMS: Mapping[str, tuple[Seam, ...]] = {"mooncake": _MOONCAKE_SEAMS, "nixl": _NIXL_SEAMS}
"""What is relied on besides with one transfer backend, looked at when it is used."""
