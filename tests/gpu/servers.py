"""Pairs of servers that share one CUDA device, and the requests that are sent to them."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.testbed.cluster import Cluster, ClusterSpec
from benchmarks.testbed.metrics import metric_sum
from benchmarks.testbed.model import cuda_identity_model
from benchmarks.testbed.servers import ServerSpec, dualpath_pair, stock_pair
from benchmarks.testbed.store import StoreSpec
from tests.e2e.direct import ask_pair
from tests.e2e.prompts import Outputs, Prompts, make_prompts
from tests.gpu import machine

sys.path.append(str(machine.REPOSITORY / "platforms" / "cpu"))  # makes the model; its platform stays asleep

NEW_TOKENS = 32
DEVICE: Any = "cuda"
# Less than the prompts take together, some 22,000 tokens, so that some are left in host memory only.
SETTINGS: Mapping[str, Any] = {"max_total_tokens": 14_000, "hicache_ratio": 2.0, "chunked_prefill_tokens": 4096}
SHOWN = {"disable_overlap_schedule": False, "hicache_io_backend": "kernel", "hicache_mem_layout": "page_first"}
"""What both servers must say of themselves, or nothing of what the checks are for is shown."""
# SGLang's own means to find what does not wait for a layer to be loaded: it sleeps before it loads each. Some 2 ms.
SLOW_LOADS = {"SGLANG_TEST_HICACHE_H2D_DELAY_CYCLES": "4000000"}
DUALPATH_FLAGS = (
    # Both sides read, whatever rates were seen, in chunks of two pages of 64 tokens x 8 KB. Files in the page cache are
    # read so fast that the other side would often come too late: a page takes 16 ms instead.
    "--dualpath-policy", "tests.e2e.policies:Sharing", "--dualpath-chunk-bytes", "1MiB",
    "--dualpath-read-rate-limit", "32MiB",
)  # fmt: skip
SERVER_START_S = 300.0  # kernels are compiled on a machine's first run


def model() -> Path:
    """The model, made when it is not there yet."""
    return cuda_identity_model(machine.REPOSITORY / "out" / "models")


def prompts() -> Prompts:
    """Those of the end-to-end tests, and some for the one check that wants to find nothing of them anywhere."""
    fresh = {f"fresh-{size}": random.Random(f"fresh-{size}").choices(range(256), k=size) for size in (200, 900, 2500)}
    return {**make_prompts(), **fresh}


def stock_servers() -> tuple[ServerSpec, ServerSpec]:
    return stock_pair(decode_hicache=True, **_settings({}))


def dualpath_servers() -> tuple[ServerSpec, ServerSpec]:
    return dualpath_pair(extra_flags=DUALPATH_FLAGS, **_settings(SLOW_LOADS))


def cluster(servers: tuple[ServerSpec, ServerSpec], name: str) -> Cluster:
    """A pair with an empty store of files and no router."""
    spec = ClusterSpec(
        model=model(),
        servers=servers,
        store=StoreSpec(kind="file"),
        router=None,
        server_start_s=SERVER_START_S,
    )
    return Cluster(spec, log_dir=machine.REPOSITORY / "out" / "gpu" / name)


def ask_all(pair: Cluster, asked: Prompts, *, names: Iterable[str] | None = None, at_once: int = 1) -> Outputs:
    """Greedy outputs by name, ``at_once`` requests in flight; of these names in this order, else of all."""
    order = list(asked if names is None else names)
    with ThreadPoolExecutor(at_once) as pool:
        answers = pool.map(lambda name: ask_pair(pair, asked[name], new_tokens=NEW_TOKENS), order)
        return dict(zip(order, answers, strict=True))


def loaded_back_bytes(pair: Cluster) -> float:
    """What the prefill server has copied from host to device memory so far."""
    return metric_sum(pair.metrics("prefill"), "sglang:load_back_tokens_total") * pair.kv_bytes_per_token


def _settings(extra_env: Mapping[str, str]) -> dict[str, Any]:
    # How device memory is best carried depends on the machine: what the caller says of it is kept.
    theirs = {key: value for key, value in os.environ.items() if key.startswith(("UCX_", "MC_"))}
    path = os.pathsep.join(filter(None, [str(machine.REPOSITORY), os.environ.get("PYTHONPATH")]))  # finds the policy
    return {
        **SETTINGS,
        "device": DEVICE,
        "transfer_backend": machine.engine(),
        "extra_env": {**theirs, **extra_env, "PYTHONPATH": path},
    }
