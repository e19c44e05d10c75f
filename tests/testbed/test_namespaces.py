"""Namespaces and links that are really made, and what they carry. Skipped where this machine cannot make them."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.testbed import state as state_module
from benchmarks.testbed.errors import NetworkError
from benchmarks.testbed.network import Network, NetworkSpec, NodeSpec, missing_requirement
from benchmarks.testbed.processes import Processes
from benchmarks.testbed.state import RunState, clean_up

pytestmark = pytest.mark.skipif(missing_requirement() is not None, reason=missing_requirement() or "")
NODES = (NodeSpec("prefill"), NodeSpec("a-node-with-a-long-name"), NodeSpec("store", ("storage",), shaped=False))
ACCEPT = """
import socket, sys
server = socket.create_server((sys.argv[1], 5001))
print("up", flush=True)
connection, _ = server.accept()
while connection.recv(1 << 20):
    pass
"""
SEND = "import socket, sys; socket.create_connection((sys.argv[1], 5001)).sendall(bytes(int(sys.argv[2])))"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunState:
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(state_module, "state_dir", lambda: directory)
    return RunState.new()


@pytest.fixture
def network(state: RunState) -> Iterator[Network]:
    made = Network(NetworkSpec(), NODES, state)
    try:
        made.up()
        yield made
    finally:
        made.close()


def namespaces() -> set[str]:
    return {path.name for path in Path("/var/run/netns").glob("*")}


def links() -> set[str]:
    return {path.name for path in Path("/sys/class/net").glob("*")}


def inside(namespace: str | None, script: str, *arguments: str) -> list[str]:
    assert namespace is not None
    return ["nsenter", f"--net=/var/run/netns/{namespace}", sys.executable, "-c", script, *arguments]


def test_everything_that_was_made_is_removed_and_nothing_else(state: RunState) -> None:
    before = namespaces(), links()
    network = Network(NetworkSpec(), NODES, state)
    network.up()
    assert len(namespaces() - before[0]) == len(NODES) + 1
    assert len(links() - before[1]) == 1
    network.close()
    network.close()
    assert (namespaces(), links()) == before


def test_a_crashed_run_is_removed_from_its_record(state: RunState) -> None:
    before = namespaces(), links()
    Network(NetworkSpec(), NODES, state).up()
    clean_up(state)
    assert (namespaces(), links()) == before


def test_a_foreign_namespace_of_the_same_name_stays(state: RunState) -> None:
    name = f"{state.name}-fabric"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        network = Network(NetworkSpec(), NODES, state)
        with pytest.raises(NetworkError, match="stays untouched"):
            network.up()
        network.close()
        assert name in namespaces()
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def test_a_storage_link_runs_at_its_rate_and_counts_what_it_carries(network: Network) -> None:
    sent_bytes = 12_500_000  # half a second at 200 Mbit/s
    node, store = network.nodes["prefill"], network.nodes["store"]
    assert node.storage_address is not None
    before = network.link_bytes()
    with subprocess.Popen(inside(node.namespace, ACCEPT, node.storage_address), stdout=subprocess.PIPE) as receiver:
        assert receiver.stdout is not None
        receiver.stdout.readline()
        start = time.monotonic()
        subprocess.run(inside(store.namespace, SEND, node.storage_address, str(sent_bytes)), check=True)
        receiver.wait(timeout=30)
        elapsed_s = time.monotonic() - start
    after = network.link_bytes()
    carried = after["prefill", "storage", "rx"] - before["prefill", "storage", "rx"]
    assert sent_bytes <= carried <= 1.02 * sent_bytes
    assert after["prefill", "compute", "rx"] - before["prefill", "compute", "rx"] < 10_000
    assert elapsed_s >= 0.9 * (sent_bytes - 1_000_000) * 8 / 200e6  # the bucket and the queue give some of it at once


def test_the_machine_reaches_a_node_on_the_compute_network_only(network: Network) -> None:
    node = network.nodes["prefill"]
    assert node.compute_address is not None
    assert ipaddress.ip_address(node.compute_address).is_private
    with subprocess.Popen(inside(node.namespace, ACCEPT, node.compute_address), stdout=subprocess.PIPE) as receiver:
        assert receiver.stdout is not None
        receiver.stdout.readline()
        subprocess.run([sys.executable, "-c", SEND, node.compute_address, "1000"], check=True)
        assert receiver.wait(timeout=30) == 0
    routes = subprocess.run(["ip", "-4", "route"], capture_output=True, text=True, check=True).stdout
    assert "10.192.0." not in routes


def test_a_program_that_looks_for_links_sees_those_of_its_namespace(
    network: Network, state: RunState, tmp_path: Path
) -> None:
    group = Processes(tmp_path, state)
    node = network.nodes["prefill"]
    try:
        script = "ls /sys/class/net; test -e /sys/fs/cgroup/$0 && echo limits; sleep 60"
        some_file = next(Path("/sys/fs/cgroup").iterdir()).name
        process = group.start("look", ["sh", "-c", script, some_file], namespace=node.namespace, sees_links=True)
        deadline_s = time.monotonic() + 10
        while "limits" not in process.log_path.read_text() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert process.log_path.read_text().split() == ["compute", "lo", "storage", "limits"]
    finally:
        group.close()
    assert "compute" not in links()
