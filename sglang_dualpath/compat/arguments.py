"""Server arguments under ``--kv-connector dualpath``: what is turned on, what is refused and what is warned about.

Set and read through SGLang's resolution hooks, so that ``--help``, logs and ``/server_info`` show what runs. What the
command line says is looked at before SGLang's own steps, which end in a traceback where two flags contradict each
other; what SGLang makes of it is looked at once more when it is through.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

from packaging.version import Version

from sglang_dualpath.compat.stop import stop_on_error
from sglang_dualpath.compat.stores import STORES, has_one_place_per_rank, has_zero_copy, sharing_warnings
from sglang_dualpath.config import read_config
from sglang_dualpath.errors import UnsupportedError

logger = logging.getLogger(__name__)

_SOURCE = "sglang_dualpath"
_STORAGE_FLAGS = "--hicache-storage-backend and --hicache-storage-backend-extra-config"
_LAYOUTS = ("page_first", "page_first_direct")
# What the command line may say, and SGLang's name for it: it renames Mooncake over TCP.
_TRANSFERS = {"mooncake": "mooncake", "mooncake_tcp": "mooncake", "nixl": "nixl"}
# Takes pages as runs, and waits without the GIL.
OLDEST_NIXL = "1.5"

FIRST_STEP = "handle_deprecated_dp_attention"
DEFAULTS_STEP = "handle_pd_disaggregation"
LAST_STEP = "handle_other_validations"


def register(verify: Callable[[], None], verify_connector: Callable[[str], None]) -> None:
    """Add our steps to SGLang's argument resolution.

    ``verify`` runs first: the hooks must be in place by then. ``verify_connector`` is given the transfer backend.
    """
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    @register_resolution_hook(FIRST_STEP)  # type: ignore[untyped-decorator]
    def _command_line(server_args: Any, previous: Callable[[Any], None]) -> None:
        stop_on_error(verify)
        stop_on_error(lambda: verify_connector(refuse_command_line(server_args)))
        previous(server_args)

    @register_resolution_hook(DEFAULTS_STEP)  # type: ignore[untyped-decorator]
    def _defaults(server_args: Any, previous: Callable[[Any], None]) -> None:
        set_defaults(server_args)
        previous(server_args)

    @register_resolution_hook(LAST_STEP)  # type: ignore[untyped-decorator]
    def _resolved(server_args: Any, previous: Callable[[Any], None]) -> None:
        previous(server_args)
        stop_on_error(lambda: refuse_resolved(server_args))


def refuse_command_line(server_args: Any) -> str:
    """Raise UnsupportedError or ConfigError for what the command line says, before SGLang has looked at it.

    Returns the transfer backend.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    cfg = resolving_view(server_args)
    mode = cfg.disaggregation_mode
    if cfg.encoder_only:
        raise UnsupportedError(
            "--kv-connector dualpath does not support --encoder-only: an encoder server has no KV cache."
        )
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
    _refuse(_unsupported(cfg))
    if cfg.hicache_storage_backend is None:
        raise UnsupportedError(_without_storage(mode))
    _refuse(_unsupported_storage(cfg))
    return _TRANSFERS[cfg.disaggregation_transfer_backend]


def set_defaults(server_args: Any) -> None:
    """Turn on what DualPath needs, and leave everything else as it was given."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    cfg = resolving_view(server_args)
    fields: dict[str, Any] = {"enable_hierarchical_cache": True, "radix_cache_backend": "dualpath"}
    if cfg.hicache_storage_prefetch_policy != "wait_complete":
        logger.info(
            "--kv-connector dualpath sets --hicache-storage-prefetch-policy wait_complete (was %s): a read ends at "
            "its own deadline.",
            cfg.hicache_storage_prefetch_policy,
        )
        fields["hicache_storage_prefetch_policy"] = "wait_complete"
    if cfg.disaggregation_mode == "decode":
        fields["disaggregation_decode_enable_radix_cache"] = True
        if cfg.hicache_ratio is None and not cfg.hicache_size:
            config = read_config()
            ratio = config.host_memory_ratio if config is not None else 2.0
            logger.info("The decode server's host pool is %g times its device pool; --hicache-ratio sets it.", ratio)
            fields["hicache_ratio"] = ratio
    declare_resolution(server_args, _SOURCE, **fields)


def refuse_resolved(server_args: Any) -> None:
    """Raise UnsupportedError for what SGLang made of the command line and the model; log what only costs speed."""
    from sglang.srt.arg_groups.overrides import resolved_view

    cfg = resolved_view(server_args)
    _refuse([*_unsupported(cfg), *_unsupported_storage(cfg), *_unsupported_host_memory(cfg)])
    for warning in sharing_warnings(cfg):
        logger.warning("%s", warning)


def _without_storage(mode: str) -> str:
    if mode == "decode":
        return (
            "A decode server with --kv-connector dualpath reads storage too: copy "
            f"{_STORAGE_FLAGS} (and --hicache-mem-layout, --hicache-io-backend and --page-size, if set) from its "
            "prefill servers' command line."
        )
    return f"--kv-connector dualpath loads KV cache from storage: say where it is with {_STORAGE_FLAGS}."


Row = tuple[bool, str, str]
"""Whether it is so, the flag, and why that is not supported."""


def _refuse(rows: list[Row]) -> None:
    for wrong, flag, why in rows:
        if wrong:
            raise UnsupportedError(f"--kv-connector dualpath does not support {flag}: {why}.")


def _unsupported(cfg: Any) -> list[Row]:
    """True before and after SGLang's resolution alike."""
    from sglang.srt.environ import envs

    transfer = cfg.disaggregation_transfer_backend
    one_reader = "a request's pages would be spread over engines that do not agree on a read yet"
    more_pools = "its cache has pages that are not read together with the KV pages"
    return [
        (cfg.enable_dp_attention, "--enable-dp-attention", one_reader),
        (cfg.attn_dp_size > 1, f"--attn-dp-size {cfg.attn_dp_size}", one_reader),
        (cfg.pp_size > 1, f"--pp-size {cfg.pp_size}", one_reader),
        (cfg.attn_cp_size > 1, f"--attn-cp-size {cfg.attn_cp_size}", one_reader),
        (cfg.dcp_size > 1, f"--dcp-size {cfg.dcp_size}", one_reader),
        (cfg.enable_kv_cache_sharding, "--enable-kv-cache-sharding", one_reader),
        (cfg.speculative_algorithm is not None, f"--speculative-algorithm {cfg.speculative_algorithm}", more_pools),
        (
            cfg.decoupled_spec_role != "null",
            f"--decoupled-spec-role {cfg.decoupled_spec_role}",
            more_pools,
        ),
        (cfg.enable_hisparse, "--enable-hisparse", more_pools),
        (
            cfg.language_only,
            "--language-only",
            "a request's tokens come from an encoder after it has arrived",
        ),
        (
            transfer not in _TRANSFERS,
            f"--disaggregation-transfer-backend {transfer}",
            f"pages are pushed over {', '.join(_TRANSFERS)} only",
        ),
        (
            transfer == "nixl" and importlib.util.find_spec("nixl") is None,
            "--disaggregation-transfer-backend nixl without the package nixl",
            "install it with pip install nixl",
        ),
        (
            transfer == "nixl" and is_older("nixl", OLDEST_NIXL),
            f"--disaggregation-transfer-backend nixl with nixl {_version('nixl')}",
            f"install {OLDEST_NIXL} or newer with pip install -U nixl",
        ),
        (
            transfer == "nixl" and envs.SGLANG_DISAGGREGATION_NIXL_BACKEND.get() != "UCX",
            f"SGLANG_DISAGGREGATION_NIXL_BACKEND={envs.SGLANG_DISAGGREGATION_NIXL_BACKEND.get()}",
            "it is not known when its writes have ended, as it is of UCX, the default",
        ),
        (
            cfg.disaggregation_decode_allocation_policy == "prefill_complete",
            "--disaggregation-decode-allocation-policy prefill_complete",
            "the decode server takes part before prefill is complete",
        ),
        (cfg.enable_pd_role_switch, "--enable-pd-role-switch", "reads belong to one role"),
        (
            cfg.disaggregation_decode_host_receive_threshold < 1,
            f"--disaggregation-decode-host-receive-threshold {cfg.disaggregation_decode_host_receive_threshold:g}",
            "below 1 it needs a host pool layout whose pages are not contiguous",
        ),
        (
            cfg.disaggregation_decode_enable_offload_kvcache,
            "--disaggregation-decode-enable-offload-kvcache",
            "the decode radix cache already writes back what it generates",
        ),
        (cfg.enable_linker_mla_dedup, "--enable-linker-mla-dedup", "it leaves ranks without pages to read into"),
        (cfg.enable_lmcache, "--enable-lmcache", "it replaces the radix cache"),
        (cfg.enable_flexkv, "--enable-flexkv", "it replaces the radix cache"),
        (
            cfg.enable_unified_cache_external_linker,
            "--enable-unified-cache-external-linker",
            "it replaces the host cache",
        ),
        (cfg.use_ray, "--use-ray", "its actors do not load plugins"),
        (
            bool(envs.SGLANG_RUST_SERVER.get()),
            "SGLANG_RUST_SERVER",
            "the Rust bootstrap server has no route for control endpoints",
        ),
    ]


def _version(package: str) -> str | None:
    """Of an installed package; None for one without metadata, such as a build on the search path."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_older(package: str, oldest: str) -> bool:
    found = _version(package)
    return found is not None and Version(found) < Version(oldest)


def _unsupported_storage(cfg: Any) -> list[Row]:
    return [
        (
            cfg.hicache_storage_backend not in STORES,
            f"--hicache-storage-backend {cfg.hicache_storage_backend}",
            f"it is not known to read straight into host pages, as {', '.join(STORES)} do",
        ),
        (
            cfg.hicache_storage_backend == "dynamic" and not has_zero_copy(cfg),
            "--hicache-storage-backend dynamic without zero-copy getters",
            'if it has them, add "interface_v1": 1 to --hicache-storage-backend-extra-config',
        ),
        (
            cfg.dp_size > 1 and has_one_place_per_rank(cfg),
            f"--dp-size {cfg.dp_size} with this {cfg.hicache_storage_backend} store",
            "SGLang gives all its ranks one place on disk, where they would overwrite each other's pages",
        ),
        (
            cfg.hicache_host_memory_mode != "cache",
            f"--hicache-host-memory-mode {cfg.hicache_host_memory_mode}",
            "pages are kept in host memory between reads",
        ),
    ]


def _unsupported_host_memory(cfg: Any) -> list[Row]:
    """Only once SGLang has resolved: some backends make it choose another layout than the command line's."""
    return [
        (
            cfg.hicache_mem_layout not in _LAYOUTS,
            f"--hicache-mem-layout {cfg.hicache_mem_layout}",
            f"pages must be contiguous, as in {' or '.join(_LAYOUTS)}",
        ),
    ]
