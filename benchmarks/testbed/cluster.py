"""A whole cluster as one context manager: networks, store, servers, router, and the questions asked to them."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.testbed.client import Client, Generation, greedy_payload
from benchmarks.testbed.errors import ProcessError, RequestError, RequirementError
from benchmarks.testbed.metrics import Labels, parse_metrics
from benchmarks.testbed.model import kv_bytes_per_token
from benchmarks.testbed.network import Direction, Network, NetworkName, NetworkSpec, NodeSpec
from benchmarks.testbed.processes import (
    PortPicker,
    Process,
    Processes,
    clean_environment,
    http_ready,
    uninterrupted,
    wait_until,
)
from benchmarks.testbed.router import RouterKind, router_command
from benchmarks.testbed.servers import Place, ServerSpec, server_command, server_environment
from benchmarks.testbed.state import RunState, clean_up_dead_runs
from benchmarks.testbed.store import (
    Store,
    StoreSpec,
    start_dynamic_store,
    start_file_store,
    start_mooncake_store,
    start_nixl_store,
)

STORE_NODE = "store"
ROUTER_MEMORY_BYTES = 300 << 20
_ROUTER_DEADLINE_S = 60.0


@dataclass(frozen=True)
class ClusterSpec:
    """What to bring up. `network` None is loopback; `router` None leaves the router out; `store` None the storage.

    Servers have `server_start_s` twice for one of them and once for each further one: they load at once, and share a
    small machine's cores for it.
    """

    model: Path
    servers: Sequence[ServerSpec]
    store: StoreSpec | None = field(default_factory=StoreSpec)
    router: RouterKind | None = "gateway"
    network: NetworkSpec | None = None
    request_timeout_s: float = 240.0
    server_start_s: float = 75.0

    def memory_bytes(self) -> dict[str, int]:
        """Expected memory by part, for a budget that is shown before anything starts."""
        kv_bytes = kv_bytes_per_token(self.model)
        budget = {spec.label: spec.memory_bytes(kv_bytes) for spec in self.servers}
        if self.store is not None:
            budget["store"] = self.store.memory_bytes
        if self.router is not None:
            budget["router"] = ROUTER_MEMORY_BYTES
        return budget


class Cluster:
    """A running cluster. Everything it made is gone after the `with` block, also when coming up has failed.

    `log_dir` receives one log per process and stays. `say` is given lines for a user: the memory budget, what comes up.
    A `suspended` cluster comes up with its network and store alone; `resume` then starts servers and router.
    """

    def __init__(
        self, spec: ClusterSpec, *, log_dir: Path, say: Callable[[str], None] = print, suspended: bool = False
    ) -> None:
        labels = [server.label for server in spec.servers]
        if len(set(labels)) != len(labels) or STORE_NODE in labels:
            raise ValueError(f"server names must differ from each other and from {STORE_NODE!r}: {labels}")
        self.spec = spec
        self.log_dir = log_dir
        self.processes: dict[str, Process] = {}
        self.places: dict[str, Place] = {}
        self.clients: dict[str, Client] = {}
        self.network: Network | None = None
        self.store: Store | None = None
        self.running = False
        self._say = say
        self._ports = PortPicker()
        self._begin_suspended = suspended

    def __enter__(self) -> Cluster:
        clean_up_dead_runs()
        if not self._begin_suspended:
            self._check_memory()
        self._state = RunState.new()
        self._processes = Processes(self.log_dir, self._state)
        try:
            if self.spec.network is not None:
                self._start_network(self.spec.network)
            self.store = self._start_store()
            if not self._begin_suspended:
                self.resume()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything; interrupts wait for it. May be called twice."""
        with uninterrupted():
            try:
                self._processes.close()
            finally:  # a process that does not even die of SIGKILL must not leave links behind
                for client in self.clients.values():
                    client.close()
                self.clients.clear()
                if self.network is not None:
                    self.network.close()
            for directory in self._state.directories:
                shutil.rmtree(directory, ignore_errors=True)
            self._state.discard()

    def resume(self) -> None:
        """Start servers and router, with empty caches, on the network and the store that are up. Nothing if they run.

        Raises ProcessError when one does not come up; `close` then still ends all of them.
        """
        if self.running:
            return
        self._start_servers()
        if self.spec.router is not None:
            self._start_router(self.spec.router)
        self.running = True
        self._describe()

    def suspend(self) -> None:
        """End servers and router; network and store stay, with all that the store holds. Nothing if none runs."""
        with uninterrupted():
            for client in self.clients.values():
                client.close()
            self.clients.clear()
            for names in (["router"], self.names):
                processes = [self.processes.pop(name) for name in names if name in self.processes]
                self._processes.stop_all(processes)
            self.running = False

    @property
    def names(self) -> list[str]:
        """Names of the servers."""
        return [server.label for server in self.spec.servers]

    def names_of(self, role: str) -> list[str]:
        return [server.label for server in self.spec.servers if server.role == role]

    @property
    def kv_bytes_per_token(self) -> int:
        return kv_bytes_per_token(self.spec.model)

    def generate(
        self, *, input_ids: Sequence[int], max_new_tokens: int, stream: bool = False, **body: Any
    ) -> Generation:
        """One greedy request through the router (thread-safe). `body` adds fields to it; `sampling_params` is merged.

        Raises RequestError when it fails.
        """
        payload = greedy_payload(input_ids, max_new_tokens, **body.pop("sampling_params", {}))
        return self.clients["router"].generate({**payload, **body}, stream=stream)

    def flush(self, *, prefill: bool = True, decode: bool = True, deadline_s: float = 120.0) -> None:
        """Drop device and host caches of the servers of these roles; storage keeps what it has.

        A server refuses while a request runs or while pages are on their way to host memory or storage, so a flush that
        went through also means that everything was written back. Raises RequestError after `deadline_s`.
        """
        roles = [role for role, wanted in (("prefill", prefill), ("decode", decode)) if wanted]
        end = time.monotonic() + deadline_s
        several = {server.label for server in self.spec.servers if server.dp_size > 1}
        for name in (name for role in roles for name in self.names_of(role)):
            # Of several data-parallel ranks SGLang passes on one's answer, so each is told to wait until it can.
            path = f"/flush_cache?timeout={deadline_s:g}" if name in several else "/flush_cache"
            while (answer := self.clients[name].post(path)).status_code != 200:
                if time.monotonic() > end:
                    raise RequestError(f"{name} still refuses to flush after {deadline_s:.0f} s: {answer.text.strip()}")
                time.sleep(0.2)

    def metrics(self, name: str) -> dict[tuple[str, Labels], float]:
        """All counters and gauges of a server, keyed by (name, labels)."""
        answer = self.clients[name].get("/metrics")
        if answer.status_code != 200:
            raise RequestError(f"/metrics of {name} answered {answer.status_code}: {answer.text[:200]}")
        return parse_metrics(answer.text)

    def link_bytes(self) -> dict[tuple[str, NetworkName, Direction], int]:
        """Bytes each node received and sent per network since the start; empty on loopback."""
        return self.network.link_bytes() if self.network is not None else {}

    def io_bytes(self, name: str) -> tuple[int, int]:
        """Bytes that a server's processes have read and written by system calls: the ground truth for `file` stores."""
        return self.processes[name].io_bytes()

    def server_log(self, name: str) -> str:
        """All that a server (or "router") has logged so far."""
        return self.processes[name].log()

    @property
    def router_url(self) -> str:
        return self.clients["router"].base_url

    def process_groups(self) -> dict[str, list[int]]:
        """Process ids of everything that runs, the store included, by name."""
        return {process.name: process.members() for process in self._processes.started}

    def start_in_node(self, name: str, node: str, command: Sequence[str]) -> Process:
        """Start a program of the caller's in a node; it ends with the cluster if it was not stopped before."""
        namespace = self.network.nodes[node].namespace if self.network is not None else None
        return self._processes.start(name, command, env=clean_environment(os.environ), namespace=namespace)

    def stop(self, processes: Sequence[Process]) -> None:
        """End programs that `start_in_node` started."""
        self._processes.stop_all(processes)

    def restart(self, name: str, *, extra_env: Mapping[str, str] | None = None) -> None:
        """Start a server anew at the same place, with `extra_env` this once, ending the old one first if it lives."""
        self._processes.stop(self.processes[name])
        spec = next(server for server in self.spec.servers if server.label == name)
        spec = replace(spec, extra_env={**spec.extra_env, **(extra_env or {})})
        self._launch(spec, self.places[name])
        self._wait_for_servers([name])

    def describe(self, **about: Any) -> None:
        """Add to what `python -m benchmarks.testbed status` says of this run."""
        self._state.describe(**about)

    @property
    def run_name(self) -> str:
        """Name of this run's record and the prefix of all that it makes."""
        return self._state.name

    def _describe(self) -> None:
        urls = {name: client.base_url for name, client in self.clients.items()}
        about: dict[str, Any] = {"urls": urls, "log_dir": str(self.log_dir.absolute())}
        if self.network is not None:
            about["fabric"] = self.network.fabric
            about["links"] = [[node, network, port] for (node, network), port in self.network.ports.items()]
        self._state.describe(**about)

    def _check_memory(self) -> None:
        budget = self.spec.memory_bytes()
        total = sum(budget.values())
        available = available_bytes()
        parts = ", ".join(f"{name} {amount / 1e9:.1f}" for name, amount in budget.items())
        self._say(f"Memory budget: {total / 1e9:.1f} GB of {available / 1e9:.1f} GB available ({parts}).")
        if total > available:
            raise RequirementError(
                f"This needs about {total / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are available: "
                "take fewer servers, smaller pools or a smaller store."
            )

    def _start_network(self, spec: NetworkSpec) -> None:
        nodes = [NodeSpec(server.label) for server in self.spec.servers]
        nodes.append(NodeSpec(STORE_NODE, ("storage",), shaped=False))
        self.network = Network(spec, nodes, self._state)
        self.network.up()

    def _start_store(self) -> Store | None:
        spec = self.spec.store
        if spec is None:
            return None
        if spec.kind == "mooncake":
            address, namespace = "127.0.0.1", None
            if self.network is not None:
                node = self.network.nodes[STORE_NODE]
                assert node.storage_address is not None
                address, namespace = node.storage_address, node.namespace
            return start_mooncake_store(spec, self._processes, self._ports, address=address, namespace=namespace)
        directory = Path(tempfile.mkdtemp(prefix=f"{self._state.name}-store-"))
        self._state.add_directory(directory)
        start = {"file": start_file_store, "nixl": start_nixl_store, "dynamic": start_dynamic_store}[spec.kind]
        return start(spec, directory / "pages")

    def _start_servers(self) -> None:
        start = time.monotonic()
        for spec in self.spec.servers:
            self._launch(spec, self._place(spec))
        self._wait_for_servers(self.names)
        self._say(f"Servers are up after {time.monotonic() - start:.0f} s: {', '.join(self.names)}.")

    def _place(self, spec: ServerSpec) -> Place:
        port, bootstrap_port = self._ports.take(), self._ports.take()
        if self.network is None:
            return Place(None, "127.0.0.1", "127.0.0.1", port, bootstrap_port)
        return Place.in_node(self.network.nodes[spec.label], port=port, bootstrap_port=bootstrap_port)

    def _launch(self, spec: ServerSpec, place: Place) -> None:
        self.places[spec.label] = place
        self.processes[spec.label] = self._processes.start(
            spec.label,
            server_command(spec, place, self.store, self.spec.model),
            env=server_environment(spec, place, self.store, os.environ),
            namespace=place.namespace,
            stage="servers",
            sees_links=spec.transfer_backend == "nixl",  # UCX looks for its devices in /sys
        )

    def _wait_for_servers(self, names: Sequence[str]) -> None:
        left = list(names)

        def all_ready() -> bool:
            left[:] = [name for name in left if not http_ready(f"{self.places[name].url}/health")]
            return not left

        processes = [self.processes[name] for name in names]
        deadline_s = self.spec.server_start_s * (1 + len(names))
        wait_until(all_ready, processes, what=f"{', '.join(names)} ready", deadline_s=deadline_s)
        for name in names:
            if name in self.clients:  # of the process that was there before a restart
                self.clients[name].close()
            self.clients[name] = Client(self.places[name].url, timeout_s=self.spec.request_timeout_s)

    def _start_router(self, kind: RouterKind) -> None:
        port = self._ports.take()
        command = router_command(
            kind,
            host="127.0.0.1",
            port=port,
            metrics_port=self._ports.take(),
            prefill=[self.places[name] for name in self.names_of("prefill")],
            decode=[self.places[name] for name in self.names_of("decode")],
        )
        router = self._processes.start("router", command, env=clean_environment(os.environ))
        self.processes["router"] = router
        url = f"http://127.0.0.1:{port}"
        probe = f"{url}/readiness" if kind == "gateway" else f"{url}/health"
        wait_until(lambda: http_ready(probe), [router], what="the router is ready", deadline_s=_ROUTER_DEADLINE_S)
        self.clients["router"] = Client(url, timeout_s=self.spec.request_timeout_s)


def available_bytes() -> int:
    """Memory that processes can still take without swapping. Raises ProcessError where /proc does not say."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ProcessError("/proc/meminfo names no MemAvailable")
