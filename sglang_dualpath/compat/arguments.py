"""Server arguments under ``--kv-connector dualpath``: what is turned on, and what is refused.

Set and read through SGLang's resolution hooks, so that ``--help``, logs and ``/server_info`` show what runs.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any

from sglang_dualpath.config import read_config
from sglang_dualpath.errors import ConfigError, UnsupportedError

logger = logging.getLogger(__name__)

_SOURCE = "sglang_dualpath"
_STORAGE_FLAGS = "--hicache-storage-backend and --hicache-storage-backend-extra-config"
_LAYOUTS = ("page_first", "page_first_direct")
# Backends whose getter and setter work on page-first host pages without copies, and SGLang's own file backend.
_STORES = ("mooncake", "file", "nixl", "hf3fs", "dynamic")


def register(verify: Callable[[], None]) -> None:
    """Add our steps to SGLang's argument resolution. ``verify`` runs first: the hooks must be in place by then."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    from sglang_dualpath.compat.hooks import stop_on_error

    @register_resolution_hook("handle_pd_disaggregation")  # type: ignore[untyped-decorator]
    def _defaults(server_args: Any, previous: Callable[[Any], None]) -> None:
        stop_on_error(verify)
        stop_on_error(lambda: set_defaults(server_args))
        previous(server_args)

    @register_resolution_hook("handle_other_validations")  # type: ignore[untyped-decorator]
    def _refusals(server_args: Any, previous: Callable[[Any], None]) -> None:
        previous(server_args)
        stop_on_error(lambda: refuse_unsupported(server_args))


def set_defaults(server_args: Any) -> None:
    """Turn on what DualPath needs. Raises UnsupportedError or ConfigError when the command line contradicts it."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    cfg = resolving_view(server_args)
    mode = cfg.disaggregation_mode
    if mode not in ("prefill", "decode"):
        raise UnsupportedError(
            "--kv-connector dualpath needs --disaggregation-mode prefill or decode: it loads KV cache over both sides."
        )
    if cfg.disable_radix_cache:
        raise UnsupportedError("--kv-connector dualpath keeps prefixes, which --disable-radix-cache forbids; drop one.")
    if cfg.radix_cache_backend is not None:
        raise UnsupportedError(
            f"--kv-connector dualpath brings its own radix cache; drop --radix-cache-backend {cfg.radix_cache_backend}."
        )
    if cfg.hicache_storage_backend is None:
        raise UnsupportedError(_without_storage(mode))
    fields: dict[str, Any] = {"enable_hierarchical_cache": True, "radix_cache_backend": "dualpath"}
    if cfg.hicache_storage_prefetch_policy != "wait_complete":
        logger.info(
            "--kv-connector dualpath sets --hicache-storage-prefetch-policy wait_complete (was %s): a read ends at "
            "its own deadline.",
            cfg.hicache_storage_prefetch_policy,
        )
        fields["hicache_storage_prefetch_policy"] = "wait_complete"
    if mode == "decode":
        fields["disaggregation_decode_enable_radix_cache"] = True
        if cfg.hicache_ratio is None and not cfg.hicache_size:
            config = read_config()
            ratio = config.host_memory_ratio if config is not None else 2.0
            logger.info("The decode server's host pool is %g times its device pool; --hicache-ratio sets it.", ratio)
            fields["hicache_ratio"] = ratio
    declare_resolution(server_args, _SOURCE, **fields)


def _without_storage(mode: str) -> str:
    if mode == "decode":
        return (
            "A decode server with --kv-connector dualpath reads storage too: copy "
            f"{_STORAGE_FLAGS} (and --hicache-mem-layout, --hicache-io-backend and --page-size, if set) from its "
            "prefill servers' command line."
        )
    return f"--kv-connector dualpath loads KV cache from storage: say where it is with {_STORAGE_FLAGS}."


def refuse_unsupported(server_args: Any) -> None:
    """Raise UnsupportedError for the first combination that would not work, saying which and why."""
    from sglang.srt.arg_groups.overrides import resolved_view

    cfg = resolved_view(server_args)
    for wrong, flag, why in _refusals(cfg):
        if wrong:
            raise UnsupportedError(f"--kv-connector dualpath does not support {flag}: {why}.")


def _refusals(cfg: Any) -> list[tuple[bool, str, str]]:
    one_reader = "a request's pages would be spread over engines that do not agree on a read yet"
    more_pools = "its cache has pages that are not read together with the KV pages"
    return [
        (cfg.tp_size > 1, f"--tp-size {cfg.tp_size}", one_reader),
        (cfg.pp_size > 1, f"--pp-size {cfg.pp_size}", one_reader),
        (cfg.attn_cp_size > 1, f"--attn-cp-size {cfg.attn_cp_size}", one_reader),
        (cfg.dcp_size > 1, f"--dcp-size {cfg.dcp_size}", one_reader),
        (cfg.dp_size > 1, f"--dp-size {cfg.dp_size}", "a decode server could not tell its prefill engine yet"),
        (cfg.enable_dp_attention, "--enable-dp-attention", one_reader),
        (cfg.speculative_algorithm is not None, f"--speculative-algorithm {cfg.speculative_algorithm}", more_pools),
        (cfg.enable_hisparse, "--enable-hisparse", more_pools),
        (cfg.enable_kv_cache_sharding, "--enable-kv-cache-sharding", one_reader),
        (
            cfg.disaggregation_transfer_backend != "mooncake",
            f"--disaggregation-transfer-backend {cfg.disaggregation_transfer_backend}",
            "pages are pushed over mooncake (or mooncake_tcp) only, in this release",
        ),
        (
            cfg.disaggregation_decode_allocation_policy == "prefill_complete",
            "--disaggregation-decode-allocation-policy prefill_complete",
            "the decode server takes part before prefill is complete",
        ),
        (cfg.enable_pd_role_switch, "--enable-pd-role-switch", "reads belong to one role"),
        (
            cfg.disaggregation_decode_host_receive_threshold < 1,
            "--disaggregation-decode-host-receive-threshold below 1",
            "it needs a host pool layout whose pages are not contiguous",
        ),
        (
            cfg.disaggregation_decode_enable_offload_kvcache,
            "--disaggregation-decode-enable-offload-kvcache",
            "the decode radix cache already writes back what it generates",
        ),
        (
            cfg.hicache_host_memory_mode != "cache",
            f"--hicache-host-memory-mode {cfg.hicache_host_memory_mode}",
            "pages are kept in host memory between reads",
        ),
        (cfg.enable_lmcache, "--enable-lmcache", "it replaces the radix cache"),
        (cfg.enable_flexkv, "--enable-flexkv", "it replaces the radix cache"),
        (
            cfg.enable_unified_cache_external_linker,
            "--enable-unified-cache-external-linker",
            "it replaces the host cache",
        ),
        (
            cfg.hicache_mem_layout not in _LAYOUTS,
            f"--hicache-mem-layout {cfg.hicache_mem_layout}",
            f"pages must be contiguous, as in {' or '.join(_LAYOUTS)}",
        ),
        (
            cfg.hicache_storage_backend not in _STORES,
            f"--hicache-storage-backend {cfg.hicache_storage_backend}",
            f"tested backends are {', '.join(_STORES)}",
        ),
        (
            cfg.hicache_storage_backend == "dynamic" and not _has_interface_v1(cfg),
            "a dynamic storage backend without zero-copy getters",
            'add "interface_v1": 1 to --hicache-storage-backend-extra-config if it has them',
        ),
        (
            os.environ.get("SGLANG_RUST_SERVER", "").lower() in ("1", "true"),
            "SGLANG_RUST_SERVER",
            "the Rust bootstrap server has no route for control endpoints",
        ),
    ]


def _has_interface_v1(cfg: Any) -> bool:
    try:
        extra = json.loads(cfg.hicache_storage_backend_extra_config or "{}")
    except ValueError as error:
        raise ConfigError(f"--hicache-storage-backend-extra-config is not JSON: {error}.") from error
    return bool(extra.get("interface_v1"))
