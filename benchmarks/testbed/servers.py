"""Command lines and environments of prefill and decode servers, on the CPU platform or on a CUDA device."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.testbed.model import PAGE_TOKENS, element_type
from benchmarks.testbed.network import Node
from benchmarks.testbed.processes import clean_environment
from benchmarks.testbed.store import MOONCAKE_ENVIRONMENT, Store

Role = Literal["prefill", "decode"]
TransferBackend = Literal["mooncake", "nixl"]
Device = Literal["cpu", "cuda"]

SERVER_MEMORY_BYTES = 5 << 29  # private memory of one server's three processes without its pools
RANK_MEMORY_BYTES = 1 << 30  # of each further scheduler process

_DEVICE_FLAGS: Mapping[Device, tuple[str, ...]] = {
    "cpu": (
        "--disable-overlap-schedule",
        "--sleep-on-idle",  # an idle scheduler otherwise spins and starves the other servers' threads
    ),
    # Scheduling is left as it is deployed: overlapped, with CUDA graphs. Memory too: servers that share a device take
    # no more of it for their pools than --max-total-tokens says, whatever fraction SGLang would allow them.
    "cuda": (
        # In bf16 an output depends on the order in which numbers are added up, and that on what else is in the batch
        # and on how much of the prompt was cached. Not so with this, which is SGLang's own answer to it.
        "--enable-deterministic-inference",
        # Of the attention backends that keep this promise and the radix cache (fa3, fa4, triton), the one that runs on
        # every CUDA architecture. It tiles keys by their position in the prompt, and asks for no page size of its own.
        "--attention-backend", "triton",
        "--max-running-requests", "16",  # bounds the CUDA graphs that are captured at start
    ),
}  # fmt: skip
_HOST_FLAGS: Mapping[Device, tuple[str, ...]] = {
    "cpu": ("--hicache-io-backend", "direct", "--hicache-mem-layout", "page_first_direct"),
    "cuda": ("--hicache-io-backend", "kernel", "--hicache-mem-layout", "page_first"),
}
_DEVICE_ENVIRONMENT: Mapping[Device, Mapping[str, str]] = {
    "cpu": {
        "SGLANG_PLATFORM": "dualpath_cpu",
        "OMP_NUM_THREADS": "1",
        # SGLang compiles small functions at their first call: 15 s of two cores, for nothing with a tiny model.
        "TORCHDYNAMO_DISABLE": "1",
        # Pools of known size on a machine that holds several servers: SGLang would keep 10 GiB free for each.
        "SGLANG_CPU_PLATFORM_HOST_RESERVE_BYTES": str(1 << 30),
    },
    "cuda": {},
}


@dataclass(frozen=True)
class ServerSpec:
    """One server.

    `kv_connector` None is stock SGLang. `hicache` gives it host memory and the store. A stock decode server without it
    keeps nothing between requests and reads nothing; with it, it reads from the store what it does not hold itself.
    A decode server with `kv_connector` and without `hicache` is given the store's flags alone: the command line of a
    deployment with HiCache on its prefill servers, to which the flag was added.
    `tp_size` ranks share each request, and each of `dp_size` such groups has requests of its own.
    On a `device` "cuda" pages are copied by kernels (layout `page_first`), on "cpu" directly (`page_first_direct`).
    `extra_flags` come last and win over the flags made here; `extra_env` likewise.
    """

    role: Role
    name: str = ""
    kv_connector: str | None = None
    hicache: bool = True
    tp_size: int = 1
    dp_size: int = 1
    max_total_tokens: int = 24_000
    hicache_ratio: float = 1.5
    transfer_backend: TransferBackend = "mooncake"
    device: Device = "cpu"
    chunked_prefill_tokens: int = 8192
    log_level: str = "info"
    extra_flags: tuple[str, ...] = ()
    extra_env: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name, which is its role unless it was given another."""
        return self.name or self.role

    def memory_bytes(self, kv_bytes: int) -> int:
        """Expected memory: the processes, the device pool and the host pool (`hicache_ratio` times the device pool).

        At most: the ranks of a GQA model have a part of each pool, those of an MLA model the whole.
        """
        ratio = self.hicache_ratio if self.hicache else 0.0
        pools = int(self.max_total_tokens * kv_bytes * (1 + ratio))
        return SERVER_MEMORY_BYTES + (self.ranks - 1) * RANK_MEMORY_BYTES + self.ranks * pools

    @property
    def ranks(self) -> int:
        """Scheduler processes."""
        return self.tp_size * self.dp_size


@dataclass(frozen=True)
class Place:
    """Where a server runs: namespace (None: this machine's own), addresses and ports."""

    namespace: str | None
    compute_address: str
    storage_address: str
    port: int
    bootstrap_port: int

    @property
    def url(self) -> str:
        return f"http://{self.compute_address}:{self.port}"

    @staticmethod
    def in_node(node: Node, *, port: int, bootstrap_port: int) -> Place:
        if node.compute_address is None or node.storage_address is None:
            raise ValueError(f"node {node.name} is not on both networks")
        return Place(node.namespace, node.compute_address, node.storage_address, port, bootstrap_port)


def stock_pair(*, decode_hicache: bool, **settings: object) -> tuple[ServerSpec, ServerSpec]:
    """Prefill and decode server without our package; `settings` are fields of both."""
    return (
        ServerSpec(role="prefill", **settings),  # type: ignore[arg-type]
        ServerSpec(role="decode", hicache=decode_hicache, **settings),  # type: ignore[arg-type]
    )


def dualpath_pair(*, kv_connector: str | None = "dualpath", **settings: object) -> tuple[ServerSpec, ServerSpec]:
    """Prefill and decode server with `--kv-connector dualpath`; `settings` are fields of both."""
    return (
        ServerSpec(role="prefill", kv_connector=kv_connector, **settings),  # type: ignore[arg-type]
        ServerSpec(role="decode", kv_connector=kv_connector, **settings),  # type: ignore[arg-type]
    )


def server_command(spec: ServerSpec, place: Place, store: Store | None, model: Path) -> list[str]:
    """The command line of a server."""
    command = [
        sys.executable, "-m", "sglang.launch_server",
        "--model-path", str(model),
        "--dtype", element_type(model),  # `auto` would run an fp32 model in bf16
        "--host", place.compute_address,
        "--port", str(place.port),
        "--device", spec.device,
        "--page-size", str(PAGE_TOKENS),
        "--max-total-tokens", str(spec.max_total_tokens),
        "--chunked-prefill-size", str(spec.chunked_prefill_tokens),
        "--disaggregation-mode", spec.role,
        "--disaggregation-transfer-backend", spec.transfer_backend,
        "--disaggregation-bootstrap-port", str(place.bootstrap_port),
        *_DEVICE_FLAGS[spec.device],
        "--enable-metrics",
        "--enable-cache-report",
        "--log-level", spec.log_level,
    ]  # fmt: skip
    if spec.hicache:
        if spec.role == "decode":
            command.append("--disaggregation-decode-enable-radix-cache")
        command += [
            "--enable-hierarchical-cache",
            "--hicache-ratio", str(spec.hicache_ratio),
            *_HOST_FLAGS[spec.device],
            "--hicache-write-policy", "write_through",
            "--hicache-storage-prefetch-policy", "wait_complete",
            *(store.flags if store else ()),
        ]  # fmt: skip
    elif spec.kv_connector is not None and store is not None:
        # What --kv-connector asks to be copied from the prefill server, and nothing that it turns on by itself.
        command += [*store.flags, *_HOST_FLAGS[spec.device]]
    if spec.tp_size > 1:
        command += ["--tp-size", str(spec.tp_size)]
    if spec.dp_size > 1:
        command += ["--dp-size", str(spec.dp_size)]
    if spec.kv_connector is not None:
        command += ["--kv-connector", spec.kv_connector]
    return [*command, *spec.extra_flags]


def server_environment(spec: ServerSpec, place: Place, store: Store | None, base: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a server; of `base` everything but proxies and settings of SGLang and Mooncake."""
    environment = clean_environment(base) | MOONCAKE_ENVIRONMENT
    environment |= {
        **_DEVICE_ENVIRONMENT[spec.device],
        "SGLANG_HOST_IP": place.compute_address,  # what a server tells its peers; also the address of the KV transfers
        "MOONCAKE_LOCAL_HOSTNAME": place.storage_address,  # of the store's client
        "GLOO_SOCKET_IFNAME": "lo",  # its ranks are on one node
        "TOKENIZERS_PARALLELISM": "false",
        # Not 5 s: a server that closes an idle connection just as the router sends on it may never see that half of a
        # request, and the router waits for the other half, which waits for it in vain.
        "SGLANG_TIMEOUT_KEEP_ALIVE": "3600",
        # Health checks would each run a request, and readiness is known without.
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
    }
    if spec.transfer_backend == "nixl":
        environment["NIXL_LOG_LEVEL"] = "WARN"
    if spec.transfer_backend == "nixl" and spec.device == "cpu":
        # Else UCX would go round shaped links: through shared memory, or over the storage network. With device memory
        # the choice is left to UCX, which needs transports for it that depend on the machine.
        environment |= {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo" if place.namespace is None else "compute"}
    if spec.ranks > 1 and spec.device == "cpu":
        # Without it SGLang wants a NUMA node for each rank. It binds no thread without AMX, which is not used here.
        cores = sorted(os.sched_getaffinity(0))
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
            str(cores[rank % len(cores)]) for rank in range(spec.ranks)
        )
    if store is not None:
        environment |= dict(store.environment)
    return environment | dict(spec.extra_env)
