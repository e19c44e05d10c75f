"""What is measured: a cluster of the testbed, or servers that somebody has started elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from benchmarks.compare import probe
from benchmarks.compare.sampler import FabricCounters, LinkCounters, LocalCounters, NoCounters
from benchmarks.testbed import Client, Cluster, RequestError, RequirementError, parse_metrics
from benchmarks.testbed.cluster import STORE_NODE
from benchmarks.testbed.metrics import Metrics
from benchmarks.testbed.processes import listens, wait_until

_PROBE_SETTLE_S = 1.0  # until the slow start and the bucket's burst are over
_PROBE_S = 2.0
_PROBE_PORT = 19999


class Target(Protocol):
    """Servers and a router of one system, and what is known of their links."""

    @property
    def names(self) -> list[str]: ...
    @property
    def router_url(self) -> str: ...
    def resume(self) -> None:
        """Bring servers and router up, if that is ours to do."""

    def suspend(self) -> None:
        """End servers and router, if they are ours; storage keeps what it has."""

    def flush(self) -> None:
        """Drop device and host caches. Returns when all pages are written back."""

    def metrics(self, name: str) -> Metrics: ...
    def set_shaped(self, shaped: bool) -> None:
        """Links at their rates or without limit, where that is ours to say."""

    def counters(self) -> LinkCounters: ...
    def link_bytes(self) -> dict[str, int]:
        """Bytes so far by "NODE/NETWORK/DIRECTION"; empty where nothing is known of links."""

    def probe_bytes_per_s(self) -> dict[str, float]:
        """What a plain TCP transfer gets through each server's storage link now, by server."""

    def process_groups(self) -> dict[str, list[int]]: ...


class TestbedTarget:
    """A cluster of the testbed, which is up or suspended."""

    __test__ = False

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._turns = 0

    @property
    def names(self) -> list[str]:
        return self.cluster.names

    @property
    def router_url(self) -> str:
        return self.cluster.router_url

    def resume(self) -> None:
        self.cluster.resume()

    def suspend(self) -> None:
        """Servers' logs go to a folder of their turn, for the next one's begin anew."""
        self.cluster.suspend()
        self._turns += 1
        for name in (*self.names, "router"):
            log = self.cluster.log_dir / f"{name}.log"
            if log.exists():
                folder = self.cluster.log_dir / f"turn{self._turns}"
                folder.mkdir(exist_ok=True)
                log.rename(folder / log.name)

    def flush(self) -> None:
        self.cluster.flush(deadline_s=240.0)

    def metrics(self, name: str) -> Metrics:
        return self.cluster.metrics(name)

    def set_shaped(self, shaped: bool) -> None:
        if self.cluster.network is not None:
            self.cluster.network.set_shaped(shaped)

    def counters(self) -> LinkCounters:
        return NoCounters() if self.cluster.network is None else FabricCounters(self.cluster.network)

    def link_bytes(self) -> dict[str, int]:
        return {"/".join(key): value for key, value in self.cluster.link_bytes().items()}

    def probe_bytes_per_s(self) -> dict[str, float]:
        """All links at once: the store's own is not limited. Counted by the links, as everything else is."""
        network = self.cluster.network
        if network is None:
            return {}
        program = [sys.executable, "-S", "-E", str(Path(probe.__file__).resolve())]
        ends = {name: network.nodes[name].storage_address or "" for name in self.names}
        started = []
        try:
            for name, address in ends.items():
                command = [*program, "receive", address, str(_PROBE_PORT)]
                receiver = self.cluster.start_in_node(f"probe-{name}", name, command)
                started.append(receiver)
                wait_until(lambda receiver=receiver: listens(receiver, _PROBE_PORT), [receiver],  # type: ignore[misc]
                           what="the probe listens", deadline_s=20.0)  # fmt: skip
            seconds = str(_PROBE_SETTLE_S + _PROBE_S + 1.0)
            for name, address in ends.items():
                command = [*program, "send", address, str(_PROBE_PORT), seconds]
                started.append(self.cluster.start_in_node(f"probe-to-{name}", STORE_NODE, command))
            time.sleep(_PROBE_SETTLE_S)
            before, start = self.link_bytes(), time.perf_counter()
            time.sleep(_PROBE_S)
            after, took_s = self.link_bytes(), time.perf_counter() - start
        finally:
            self.cluster.stop(started)
        return {name: (after[f"{name}/storage/rx"] - before[f"{name}/storage/rx"]) / took_s for name in self.names}

    def process_groups(self) -> dict[str, list[int]]:
        return self.cluster.process_groups()


class DeployedTarget:
    """Servers that run already, by URL. Their storage links are devices of this machine, or unknown.

    `devices` names the device of a link, as {"prefill/storage": "eth1"} (see `LocalCounters`). Nothing is started,
    ended or shaped, and there is no probe: `link_bytes_per_s` says what a link of a server is known to carry.
    """

    def __init__(
        self, router_url: str, servers: Mapping[str, str], devices: Mapping[str, str],
        link_bytes_per_s: float | None = None,
    ) -> None:  # fmt: skip
        """Raises RequirementError for a device that is not there, or is of no server."""
        for link in devices:
            if link not in {f"{name}/storage" for name in servers}:
                known = ", ".join(f"{name}/storage" for name in servers)
                raise RequirementError(f"There is no link {link!r}: take {known}.")
        try:
            self._counters = LocalCounters(devices)
        except ValueError as error:
            raise RequirementError(str(error)) from error
        self._router_url = router_url
        self._clients = {name: Client(url) for name, url in servers.items()}
        self._devices = dict(devices)
        self._link_bytes_per_s = link_bytes_per_s

    @property
    def names(self) -> list[str]:
        return list(self._clients)

    @property
    def router_url(self) -> str:
        return self._router_url

    def resume(self) -> None:
        for name, client in self._clients.items():
            if client.get("/health").status_code != 200:
                raise RequestError(f"{name} at {client.base_url} is not healthy: start it first.")

    def suspend(self) -> None:
        pass

    def flush(self) -> None:
        end = time.monotonic() + 240.0
        for name, client in self._clients.items():
            while (answer := client.post("/flush_cache")).status_code != 200:
                if time.monotonic() > end:
                    raise RequestError(f"{name} refuses to flush its caches: {answer.text.strip()[:200]}")
                time.sleep(0.5)

    def metrics(self, name: str) -> Metrics:
        """Empty for a server without --enable-metrics."""
        answer = self._clients[name].get("/metrics")
        return parse_metrics(answer.text) if answer.status_code == 200 else {}

    def set_shaped(self, shaped: bool) -> None:
        pass

    def counters(self) -> LinkCounters:
        return self._counters

    def link_bytes(self) -> dict[str, int]:
        return self._counters.read()

    def probe_bytes_per_s(self) -> dict[str, float]:
        if self._link_bytes_per_s is None:
            return {}
        return {name: self._link_bytes_per_s for name in self.names if f"{name}/storage" in self._devices}

    def process_groups(self) -> dict[str, list[int]]:
        return {}

    def close(self) -> None:
        """Close connections; servers go on."""
        for client in self._clients.values():
            client.close()
