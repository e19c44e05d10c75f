"""What the command line says about the store: whether it can be read here, and which NIC its traffic takes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_dualpath.errors import ConfigError

_FLAG = "--hicache-storage-backend-extra-config"

# Backends whose getter and setter work on page-first host pages without copies, and SGLang's own file backend.
# Not "hf3fs": without a metadata server each process numbers the pages of one and the same file for itself.
STORES = ("mooncake", "file", "nixl", "dynamic")


def extra_config(cfg: Any) -> dict[str, Any]:
    """The store's settings as SGLang reads them, from JSON text or an ``@file``. Raises ConfigError."""
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

    try:
        settings = HybridCacheController.parse_storage_backend_extra_config(cfg.hicache_storage_backend_extra_config)[0]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{_FLAG} cannot be read: {error}.") from error
    return dict(settings)


def has_zero_copy(cfg: Any) -> bool:
    """Whether a ``dynamic`` backend says that it reads straight into host pages. Raises ConfigError."""
    return bool(extra_config(cfg).get("interface_v1"))


def has_one_place_per_rank(cfg: Any) -> bool:
    """Whether the store keeps pages in a file or a directory of its own for each rank of tensor parallelism.

    SGLang numbers engines for the store without their data-parallel rank. Raises ConfigError.
    """
    store = _mooncake_settings(cfg) if cfg.hicache_storage_backend == "mooncake" else None
    return store is not None and bool(store.enable_ssd_offload)


def sharing_warnings(cfg: Any) -> list[str]:
    """Sentences about settings that work but make two kinds of traffic meet on one NIC."""
    store = _mooncake_settings(cfg) if cfg.hicache_storage_backend == "mooncake" else None
    if store is None:
        return []
    warnings = []
    if store.global_segment_size > 0:
        warnings.append(
            "This server lends host memory to the store (global_segment_size), so other servers' storage reads use its "
            "NIC too; set it to 0 and let separate processes hold the store, or expect less from the second read path."
        )
    if store.enable_ssd_offload:
        warnings.append(
            "The store keeps pages on disk (enable_ssd_offload): give the prefill and the decode server an "
            "ssd_offload_path of their own, as each overwrites what the other wrote in a common one."
        )
    if store.protocol == "rdma" and os.environ.get("MC_FORCE_TCP") != "1":
        shared = shared_devices(store.device_name, hop_devices(cfg))
        if shared is not None:
            warnings.append(
                f"The store's transfers and the hop share a NIC ({shared}); give them different ones with device_name "
                f"in {_FLAG} and --disaggregation-ib-device, or expect less from the second read path."
            )
    return warnings


def shares_engine(backend: Any, engine: str) -> bool:
    """Whether the store transfers through the engine of this name, and so has registered the host pool with it.

    SGLang's Mooncake store takes the engine of the KV transfer, under that engine's name, where both use the same NIC
    and RDMA.
    """
    name = getattr(getattr(backend, "store", None), "get_hostname", None)
    return name is not None and name() == engine


def hop_devices(cfg: Any) -> str | None:
    """NICs that the transfer backend was given; SGLang lets UCX's own setting overrule the flag for NIXL."""
    if cfg.disaggregation_transfer_backend == "nixl" and os.environ.get("UCX_NET_DEVICES"):
        names = [name.partition(":")[0] for name in os.environ["UCX_NET_DEVICES"].split(",")]
        # "all", or all but some: UCX chooses.
        return None if names == ["all"] or names[0].startswith("^") else ",".join(names)
    given: str | None = cfg.disaggregation_ib_device
    return given


def shared_devices(store: str | None, hop: str | None) -> str | None:
    """The devices that both use, as text; None if they are apart. Unset means whatever the transfer engine finds."""
    if not store or not hop:
        return "chosen from all" if not store and not hop else store or hop
    common = sorted(_devices(store) & _devices(hop))
    return ", ".join(common) if common else None


def _devices(text: str) -> set[str]:
    """Names in a comma-separated list, or in a JSON mapping from GPU or rank to such lists, or in a file with one."""
    text = text.strip()
    if text.endswith(".json") and Path(text).is_file():
        text = Path(text).read_text().strip()
    lists = [text]
    if text.startswith("{"):
        try:
            mapping = json.loads(text)
        except ValueError:
            return set()
        lists = [str(names) for names in mapping.values()] if isinstance(mapping, Mapping) else []
    return {name.strip() for names in lists for name in names.split(",") if name.strip()}


def _mooncake_settings(cfg: Any) -> Any:
    """The store's settings, found in the order in which the backend looks for them. None if there are none it takes."""
    from sglang.srt.environ import envs
    from sglang.srt.mem_cache.storage.mooncake_store.mooncake_store import MooncakeStoreConfig

    settings = extra_config(cfg)
    try:
        if settings.get("master_server_address") is not None or settings.get("client_server_address") is not None:
            return MooncakeStoreConfig.load_from_extra_config(settings)
        if envs.SGLANG_HICACHE_MOONCAKE_CONFIG_PATH.is_set():
            return MooncakeStoreConfig.from_file()
        return MooncakeStoreConfig.load_from_env()
    except (RuntimeError, ValueError):
        # The backend says it better, in the scheduler process.
        return None
