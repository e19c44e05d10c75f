"""What of the networks can be tested without making them."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from benchmarks.testbed import state as state_module
from benchmarks.testbed.errors import NetworkError, RequirementError
from benchmarks.testbed.network import Network, NetworkSpec, NodeSpec, free_subnet, missing_requirement
from benchmarks.testbed.state import RunState

NODES = (NodeSpec("prefill"), NodeSpec("store", ("storage",), shaped=False))


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunState:
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(state_module, "state_dir", lambda: directory)
    return RunState.new()


def test_a_free_subnet_overlaps_none_that_is_taken() -> None:
    taken = [ipaddress.IPv4Network("10.193.0.0/16"), ipaddress.IPv4Network("10.194.0.0/24")]
    subnet = free_subnet(taken, seed=0)
    assert subnet == ipaddress.IPv4Network("10.194.1.0/24")
    assert subnet.is_private


def test_no_free_subnet_is_an_error() -> None:
    with pytest.raises(NetworkError, match="No private /24"):
        free_subnet([ipaddress.IPv4Network("10.0.0.0/8")], seed=3)


def test_without_root_the_reason_is_one_sentence(monkeypatch: pytest.MonkeyPatch, state: RunState) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(RequirementError, match=r"^Shaped networks need root .*\.$"):
        Network(NetworkSpec(), NODES, state)


def test_without_iproute2_the_reason_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda program, path: None)
    assert "iproute2" in (missing_requirement() or "")
