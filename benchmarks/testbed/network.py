"""A cluster's two networks on one machine: namespaces as nodes, bridges as switches, `tc` as NIC speeds.

      node "prefill"          node "decode"           node "store"        this machine's own namespace
     storage  compute        storage  compute            storage                   compute
        |        |              |        |                  |                         |
    ====+=======================+===========================+====  storage bridge     |
                 |                       |                                            |
             ====+=======================+============================================+====  compute bridge

Both bridges live in a namespace of their own ("fabric"), so that neither firewall rules nor forwarding settings of the
machine touch this traffic, and deleting the namespaces removes everything. The one thing in the machine's own namespace
is a link into the compute bridge, through which routers and clients reach the servers.

A link is shaped in both directions by a token bucket at either end: the fabric's end limits what the node receives, the
node's end what it sends. Byte counters are those of the fabric's ends, which no program in a node can influence.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.testbed.errors import NetworkError, RequirementError
from benchmarks.testbed.state import RunState, remove_link, remove_namespace, tool_environment

NetworkName = Literal["storage", "compute"]
Direction = Literal["rx", "tx"]  # as seen by the node: rx is what it received
LinkBytes = Mapping[tuple[str, NetworkName, Direction], int]

MTU_BYTES = 9000  # jumbo frames, as storage networks use; keeps the header share and the packet rate low
_BURST_S = 0.004  # the bucket holds this much time at the link's rate: long enough for a timer tick of 250 Hz
_MIN_BURST_BYTES = 128 * 1024  # one segmented send of 64 KB must fit
_QUEUE_S = 0.050  # what may wait behind the bucket: about the buffer of a switch port


@dataclass(frozen=True)
class NetworkSpec:
    """Rates of every shaped node's links in bits per second; None leaves that network unshaped.

    The default is the fixed setting in which results are reported: SNIC 200 Mbit/s, CNIC 1,600 Mbit/s.
    """

    snic_bits_per_s: int | None = 200_000_000
    cnic_bits_per_s: int | None = 1_600_000_000

    @property
    def shaped(self) -> bool:
        return self.snic_bits_per_s is not None or self.cnic_bits_per_s is not None


@dataclass(frozen=True)
class NodeSpec:
    """A node by name, the networks it is on, and whether its links run at the spec's rates."""

    name: str
    networks: tuple[NetworkName, ...] = ("storage", "compute")
    shaped: bool = True


@dataclass(frozen=True)
class Node:
    """A node that is up: its namespace (None: this machine's own) and its addresses (None: not on that network)."""

    name: str
    namespace: str | None
    storage_address: str | None
    compute_address: str | None


def missing_requirement() -> str | None:
    """The sentence saying why networks cannot be made here, or None when they can."""
    if os.geteuid() != 0:
        return "Shaped networks need root (namespaces and traffic shaping): run this as root, or use loopback."
    for program in ("ip", "tc", "nsenter", "unshare"):
        if shutil.which(program, path=tool_environment()["PATH"]) is None:
            return f"Shaped networks need `{program}` (Debian: iproute2, util-linux): install it, or use loopback."
    return _namespace_refusal()


@functools.cache
def _namespace_refusal() -> str | None:
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        said = probe.stderr.strip()
        return f"Shaped networks need network namespaces, which this machine refuses ({said}): use loopback."
    return None


def run(*command: str) -> str:
    """Run one `ip` or `tc` command; its output. Raises NetworkError with what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=tool_environment())
    if done.returncode:
        raise NetworkError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def tbf_arguments(rate_bits_per_s: int) -> list[str]:
    """Arguments of `tc qdisc … tbf` for a rate."""
    burst_bytes = max(_MIN_BURST_BYTES, int(rate_bits_per_s / 8 * _BURST_S))
    queue_bytes = burst_bytes + max(256 * 1024, int(rate_bits_per_s / 8 * _QUEUE_S))
    return ["tbf", "rate", f"{rate_bits_per_s}bit", "burst", str(burst_bytes), "limit", str(queue_bytes)]


def free_subnet(taken: Sequence[ipaddress.IPv4Network], *, seed: int) -> ipaddress.IPv4Network:
    """A private /24 that overlaps none of `taken`; `seed` spreads runs. Raises NetworkError when none is left."""
    candidates = [ipaddress.IPv4Network((0x0A000000 + (193 << 16) + (index << 8), 24)) for index in range(32 * 256)]
    start = seed * 97 % len(candidates)
    for subnet in candidates[start:] + candidates[:start]:
        if not any(subnet.overlaps(other) for other in taken):
            return subnet
    raise NetworkError("No private /24 subnet between 10.193.0.0 and 10.224.255.0 is free on this machine.")


def routed_subnets() -> list[ipaddress.IPv4Network]:
    """IPv4 networks this machine's own namespace has a route to, the default route left out."""
    subnets = []
    for route in json.loads(run("ip", "-4", "-j", "route", "show", "table", "all") or "[]"):
        with contextlib.suppress(ValueError):
            subnets.append(ipaddress.IPv4Network(route.get("dst", ""), strict=False))
    return [subnet for subnet in subnets if subnet.prefixlen > 0]


def read_link_bytes(
    fabric: str, ports: Mapping[tuple[str, NetworkName], str]
) -> dict[tuple[str, NetworkName, Direction], int]:
    """Bytes each node has received ("rx") and sent ("tx"), from the links' own counters at the fabric's ends."""
    counters = json.loads(run("ip", "-n", fabric, "-s", "-j", "link", "show"))
    statistics = {link["ifname"]: link["stats64"] for link in counters}
    result: dict[tuple[str, NetworkName, Direction], int] = {}
    for (node, network), port in ports.items():
        # The fabric's end sends what the node receives.
        result[node, network, "rx"] = int(statistics[port]["tx"]["bytes"])
        result[node, network, "tx"] = int(statistics[port]["rx"]["bytes"])
    return result


class Network:
    """The networks and nodes of one run. `close` removes them, whatever state they are in; it may be called twice."""

    def __init__(self, spec: NetworkSpec, nodes: Sequence[NodeSpec], state: RunState) -> None:
        """Record nothing and make nothing yet: `up` does. Raises RequirementError when this machine cannot."""
        refusal = missing_requirement()
        if refusal:
            raise RequirementError(refusal)
        if len({node.name for node in nodes}) != len(nodes):
            raise ValueError("two nodes have the same name")
        self.spec = spec
        self._specs = tuple(nodes)
        self._state = state
        self._fabric = f"{state.name}-fabric"
        self._host_link = f"{state.name}h"[:15]
        self._ports: dict[tuple[str, NetworkName], str] = {}
        self._storage_subnet = ipaddress.IPv4Network("10.192.0.0/24")  # exists in nodes only
        self._compute_subnet = self._storage_subnet
        self.nodes: dict[str, Node] = {}
        self.host_address = ""  # of this machine on the compute network

    def up(self) -> None:
        """Make the bridges, the host's link and every node. After an error `close` removes what was made."""
        self._make_namespace(self._fabric)
        for bridge in ("storage", "compute"):
            run("ip", "-n", self._fabric, "link", "add", bridge, "mtu", str(MTU_BYTES), "type", "bridge")
            run("ip", "-n", self._fabric, "link", "set", bridge, "up")
        self._compute_subnet = free_subnet(routed_subnets(), seed=os.getpid())
        self._connect_host()
        for index, node in enumerate(self._specs, start=1):
            self._add_node(node, index)

    def close(self) -> None:
        """Remove the links and namespaces of this run, and only those."""
        for link in list(self._state.links):
            remove_link(link)
            self._state.forget_link(link)
        for namespace in list(self._state.namespaces):
            remove_namespace(namespace)
            self._state.forget_namespace(namespace)

    def link_bytes(self) -> dict[tuple[str, NetworkName, Direction], int]:
        """Bytes each node has received ("rx") and sent ("tx") on each network since the network is up."""
        return read_link_bytes(self._fabric, self._ports)

    @property
    def fabric(self) -> str:
        """The namespace that holds the bridges."""
        return self._fabric

    @property
    def ports(self) -> dict[tuple[str, NetworkName], str]:
        """The fabric's end of each node's link: its device name in the namespace `fabric`."""
        return dict(self._ports)

    def set_shaped(self, shaped: bool) -> None:
        """Give all links of shaped nodes the spec's rates, or none, while they are in use."""
        for node in self._specs:
            for network in node.networks if node.shaped else ():
                rate = self.spec.snic_bits_per_s if network == "storage" else self.spec.cnic_bits_per_s
                self.reshape(node.name, network, rate if shaped else None)

    def reshape(self, node: str, network: NetworkName, rate_bits_per_s: int | None) -> None:
        """Change one link's rate in both directions while it is in use; None removes the limit."""
        namespace = self.nodes[node].namespace
        for space, device in ((self._fabric, self._ports[node, network]), (namespace, network)):
            if space is not None:
                self._shape(space, device, rate_bits_per_s)

    def _make_namespace(self, name: str) -> None:
        if Path("/var/run/netns", name).exists():
            raise NetworkError(f"A namespace {name} exists already and is not of this run; it stays untouched.")
        self._state.add_namespace(name)
        run("ip", "netns", "add", name)
        run("ip", "-n", name, "link", "set", "lo", "up")

    def _connect_host(self) -> None:
        if Path("/sys/class/net", self._host_link).exists():
            raise NetworkError(f"A link {self._host_link} exists already and is not of this run; it stays untouched.")
        self._state.add_link(self._host_link)
        run("ip", "link", "add", self._host_link, "mtu", str(MTU_BYTES), "type", "veth",
            "peer", "name", "c-host", "mtu", str(MTU_BYTES), "netns", self._fabric)  # fmt: skip
        self._plug("c-host", "compute")
        self.host_address = str(self._compute_subnet[254])
        run("ip", "address", "add", f"{self.host_address}/24", "dev", self._host_link)
        run("ip", "link", "set", self._host_link, "up")

    def _add_node(self, node: NodeSpec, index: int) -> None:
        namespace = f"{self._state.name}-{node.name}"
        self._make_namespace(namespace)
        addresses: dict[NetworkName, str] = {}
        for network in node.networks:
            subnet = self._storage_subnet if network == "storage" else self._compute_subnet
            addresses[network] = str(subnet[index])
            port = f"{network[0]}-{index}"  # link names have 15 characters at most, node names may have more
            run("ip", "-n", self._fabric, "link", "add", port, "mtu", str(MTU_BYTES), "type", "veth",
                "peer", "name", network, "mtu", str(MTU_BYTES), "netns", namespace)  # fmt: skip
            self._plug(port, network)
            run("ip", "-n", namespace, "address", "add", f"{addresses[network]}/24", "dev", network)
            run("ip", "-n", namespace, "link", "set", network, "up")
            self._ports[node.name, network] = port
            rate = self.spec.snic_bits_per_s if network == "storage" else self.spec.cnic_bits_per_s
            if node.shaped and rate is not None:
                self._shape(self._fabric, port, rate)
                self._shape(namespace, network, rate)
        self.nodes[node.name] = Node(node.name, namespace, addresses.get("storage"), addresses.get("compute"))

    def _plug(self, port: str, bridge: NetworkName) -> None:
        run("ip", "-n", self._fabric, "link", "set", port, "master", bridge)
        run("ip", "-n", self._fabric, "link", "set", port, "up")

    @staticmethod
    def _shape(namespace: str, device: str, rate_bits_per_s: int | None) -> None:
        if rate_bits_per_s is None:
            with contextlib.suppress(NetworkError):  # there was no limit
                run("tc", "-n", namespace, "qdisc", "delete", "dev", device, "root")
            return
        run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *tbf_arguments(rate_bits_per_s))
