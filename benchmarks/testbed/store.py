"""The storage that servers load KV cache from: a Mooncake store in a node of its own, or a directory of files."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.testbed.errors import RequirementError
from benchmarks.testbed.processes import PortPicker, Processes, clean_environment, listens, wait_until
from benchmarks.testbed.store_node import READY_LINE

REPOSITORY = Path(__file__).resolve().parents[2]
MOONCAKE_ENVIRONMENT = {
    "MC_FORCE_TCP": "1",
    "MOONCAKE_PROTOCOL": "tcp",
    "MC_TCP_ENABLE_CONNECTION_POOL": "1",  # without it every 64 KB slice opens a connection: 21 MB/s, not 1,493 MB/s
}
_START_DEADLINE_S = 60.0


StoreKind = Literal["mooncake", "file", "nixl", "dynamic"]


@dataclass(frozen=True)
class StoreSpec:
    """Which store, and how much it holds.

    `mooncake` keeps `capacity_bytes` in the memory of one process and evicts above 90 % of it. `file` and `nixl` (its
    POSIX plugin) are directories, `dynamic` any backend class: all take `extra_config` and SGLang's flags for them.
    """

    kind: StoreKind = "mooncake"
    capacity_bytes: int = 3 << 30
    extra_config: Mapping[str, object] | None = None

    @property
    def memory_bytes(self) -> int:
        return self.capacity_bytes if self.kind == "mooncake" else 0


@dataclass(frozen=True)
class Store:
    """A store that is up: what a server is started with to use it."""

    flags: tuple[str, ...]
    environment: Mapping[str, str]
    directory: Path | None = None  # of a store of files


def start_file_store(spec: StoreSpec, directory: Path) -> Store:
    """An empty directory as a store."""
    directory.mkdir(parents=True)
    return Store(_flags("file", spec.extra_config), _file_environment(directory), directory)


def start_nixl_store(spec: StoreSpec, directory: Path) -> Store:
    """The same, read and written by NIXL's POSIX plugin."""
    directory.mkdir(parents=True)
    posix = {"active": True, "use_posix_aio": "true"}
    # Through the page cache: not every file system that temporary files are on can do without.
    config = {"plugin": {"posix": posix}, "l3_cleaner_enabled": False, "use_direct_io": False}
    environment = {"SGLANG_HICACHE_NIXL_BACKEND_STORAGE_DIR": str(directory)}
    return Store(_flags("nixl", config | dict(spec.extra_config or {})), environment, directory)


def start_dynamic_store(spec: StoreSpec, directory: Path) -> Store:
    """A backend class of the caller's own; it finds `directory` where the `file` backend would."""
    if not spec.extra_config or "module_path" not in spec.extra_config:
        raise ValueError("a dynamic store needs extra_config with backend_name, module_path and class_name")
    directory.mkdir(parents=True)
    return Store(_flags("dynamic", spec.extra_config), _file_environment(directory), directory)


def start_mooncake_store(
    spec: StoreSpec, processes: Processes, ports: PortPicker, *, address: str, namespace: str | None
) -> Store:
    """Start mooncake_master and a process that lends a segment, both at `address`; wait until the store serves."""
    master_program = mooncake_master_program()
    host = "127.0.0.1" if namespace is None else "0.0.0.0"  # in a namespace nobody else shares its ports
    port, metrics_port = ports.take(), ports.take()
    master = processes.start(
        "store-master",
        mooncake_master_command(master_program, host=host, port=port, metrics_port=metrics_port),
        env=clean_environment(os.environ) | MOONCAKE_ENVIRONMENT,
        namespace=namespace,
        stage="store",
    )
    wait_until(
        lambda: listens(master, port),
        [master],
        what="the store's master serves",
        deadline_s=_START_DEADLINE_S,
    )
    node_environment = clean_environment(os.environ) | MOONCAKE_ENVIRONMENT
    search_path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    node = processes.start(
        "store-node",
        [sys.executable, "-m", "benchmarks.testbed.store_node", "--master", f"{address}:{port}",
         "--address", address, "--segment-bytes", str(spec.capacity_bytes)],
        env=node_environment | {"PYTHONPATH": search_path},
        namespace=namespace,
        stage="store",
    )  # fmt: skip
    wait_until(
        lambda: READY_LINE in node.log(),
        [master, node],
        what="the store has its segment",
        deadline_s=_START_DEADLINE_S,
    )
    config = {
        "master_server_address": f"{address}:{port}",
        "metadata_server": "P2PHANDSHAKE",
        "global_segment_size": 0,  # servers lend nothing: every byte comes from the store's node
        "protocol": "tcp",
        **(spec.extra_config or {}),
    }
    return Store(_flags("mooncake", config), {})


def mooncake_master_program() -> str:
    """Path of mooncake_master: beside this interpreter, else on PATH. Raises RequirementError when there is none."""
    beside = Path(sys.executable).with_name("mooncake_master")
    found = str(beside) if beside.exists() else shutil.which("mooncake_master")
    if found is None:
        raise RequirementError("mooncake_master is missing: install mooncake-transfer-engine or its non-cuda build.")
    return found


def mooncake_master_command(program: str, *, host: str, port: int, metrics_port: int) -> list[str]:
    """Command line of the master.

    A batch of SGLang's reads is up to 128 pages, 5 s at 200 Mbit/s, and several share the link. Pages whose lease ends
    in the meantime count as lost: stock SGLang then recomputes, or fails a request. The default of 10 s is too short.
    """
    return [
        program,
        f"--rpc_address={host}",
        f"--rpc_port={port}",
        f"--metrics_host={host}",
        f"--metrics_port={metrics_port}",
        "--rpc_thread_num=2",
        "--enable_metric_reporting=false",  # a page of log every ten seconds
        "--default_kv_lease_ttl=120000",
        "--client_ttl=30",  # heartbeats may be late on two busy cores
    ]


def _file_environment(directory: Path) -> Mapping[str, str]:
    return {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(directory)}


def _flags(backend: str, extra_config: Mapping[str, object] | None) -> tuple[str, ...]:
    flags: Sequence[str] = ("--hicache-storage-backend", backend)
    if extra_config:
        flags = (*flags, "--hicache-storage-backend-extra-config", json.dumps(dict(extra_config)))
    return tuple(flags)
