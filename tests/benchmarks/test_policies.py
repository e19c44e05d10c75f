"""The policy that benchmarks and end-to-end tests switch while servers run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.policies import PolicySwitch, Switchable
from sglang_dualpath.policy import BalancingPolicy, ClusterView, ReadRequest, load_policy

READ = ReadRequest(room=1, prefill="p", decode="d", hit_pages=64, page_bytes=1 << 20)


@pytest.fixture
def switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PolicySwitch:
    switch = PolicySwitch(tmp_path / "policy")
    for name, value in switch.environment.items():
        monkeypatch.setenv(name, value)
    return switch


def readers(policy: BalancingPolicy) -> list[str]:
    return [share.engine for share in policy.plan(READ, ClusterView([])).shares]


def test_a_server_started_with_the_flags_follows_the_switch(switch: PolicySwitch) -> None:
    flag, name = switch.flags
    assert flag == "--dualpath-policy"
    policy = load_policy(name)
    assert isinstance(policy, Switchable)
    assert policy.needs_decode
    assert policy.reads_ahead  # as `split`, which it starts with
    switch.use("prefill")
    assert not policy.needs_decode
    assert not policy.reads_ahead
    assert readers(policy) == ["p"]
    switch.use("decode")
    assert readers(policy) == ["d"]


def test_the_policy_is_found_from_any_directory(switch: PolicySwitch, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from sglang_dualpath.policy import load_policy\n"
        f"print(load_policy({switch.flags[1]!r}).needs_decode, 'benchmarks.testbed' in sys.modules)\n"
    )
    switch.use("prefill")
    environment = {"PATH": os.environ["PATH"], **switch.environment}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["False", "False"], done.stderr
