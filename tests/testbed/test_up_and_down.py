"""The testbed's command line: what `up` starts, what `status` tells, and that `down` ends what a record names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.testbed import runs, up
from benchmarks.testbed.commands import _arguments, app
from benchmarks.testbed.errors import ProcessError, RequirementError
from benchmarks.testbed.network import missing_requirement
from benchmarks.testbed.state import RunState, recorded_runs, start_ticks
from benchmarks.testbed.store import REPOSITORY

Owner = Callable[..., "subprocess.Popen[bytes]"]
needs_networks = pytest.mark.skipif(missing_requirement() is not None, reason=missing_requirement() or "")


@pytest.fixture(autouse=True)
def _own_state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on this machine that are really going on stay unseen, here and in child processes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.fixture
def owner() -> Iterator[Owner]:
    """Starts a process that owns a run, and returns when that is recorded."""
    started: list[subprocess.Popen[bytes]] = []

    def start(mode: str = "polite", *words: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.testbed.owner", mode, *words], stdout=subprocess.PIPE, start_new_session=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"owner is ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    for run in recorded_runs():
        runs.end(run)


def only_run() -> RunState:
    (run,) = recorded_runs()
    return run


def command(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def wait_until_gone(pid: int) -> None:
    deadline_s = time.monotonic() + 10
    while start_ticks(pid) is not None:
        assert time.monotonic() < deadline_s, f"process {pid} is still there"
        time.sleep(0.02)


def test_status_tells_of_processes_and_addresses(owner: Owner) -> None:
    process = owner()
    (told,) = json.loads(command("status", "--json"))["runs"]
    assert told["owner"] == {"pid": process.pid, "alive": True}
    assert told["urls"] == {"server": "http://127.0.0.1:1"}
    (server,) = told["processes"]
    assert (server["name"], server["alive"]) == ("server", True)
    os.kill(server["pid"], signal.SIGKILL)
    process.kill()
    process.wait()
    wait_until_gone(server["pid"])
    (told,) = json.loads(command("status", "--json"))["runs"]
    assert not told["owner"]["alive"]
    assert not told["processes"][0]["alive"]
    assert "is gone" in command("status")


def test_status_without_runs_says_so() -> None:
    assert command("status") == "No run.\n"
    assert command("list") == "No run.\n"
    assert command("down") == "No run has left anything behind.\n"


def test_down_asks_a_living_up_to_take_everything_down(owner: Owner) -> None:
    process = owner("polite", "detached")
    run = only_run()
    assert f"{run.name}: removed" in command("down")
    assert process.wait(timeout=10) == 0
    assert list(recorded_runs()) == []
    wait_until_gone(run.processes[0][0])


def test_down_leaves_what_runs_in_a_terminal_unless_it_is_named(owner: Owner) -> None:
    process = owner()
    run = only_run()
    assert "left alone" in command("down")
    assert process.poll() is None
    command("down", run.name)
    assert process.wait(timeout=10) == 0


def test_down_all_ends_every_run(owner: Owner) -> None:
    first, second = owner(), owner("polite", "detached")
    command("down", "--all")
    assert first.wait(timeout=10) == second.wait(timeout=10) == 0
    assert list(recorded_runs()) == []


def test_down_removes_what_a_killed_up_has_left(owner: Owner) -> None:
    process = owner()
    process.kill()
    process.wait()
    run = only_run()
    directories = [Path(one) for one in run.directories]
    assert len(directories) == 2, "its own, and the temporary one of its server"
    assert all(one.exists() for one in directories)
    command("down")
    wait_until_gone(run.processes[0][0])
    assert not any(one.exists() for one in directories)
    assert list(recorded_runs()) == []


def test_down_kills_an_up_that_does_not_listen(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_OWNER_DEADLINE_S", 0.3)
    process = owner("deaf", "detached")
    run = only_run()
    command("down")
    assert process.wait(timeout=10) == -signal.SIGKILL
    wait_until_gone(run.processes[0][0])


def test_down_ends_an_up_that_is_frozen(owner: Owner) -> None:
    process = owner("polite", "detached")
    process.send_signal(signal.SIGSTOP)
    command("down")
    assert process.wait(timeout=10) == 0


def test_a_process_that_took_over_the_owners_id_is_not_signalled() -> None:
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    run = RunState.new()
    run.owner_pid, run.owner_start = stranger.pid, (start_ticks(stranger.pid) or 0) - 1
    run.describe(command=runs.UP)
    command("down", run.name)
    time.sleep(0.1)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_an_unknown_name_is_refused_and_nothing_is_ended(owner: Owner) -> None:
    process = owner()
    result = CliRunner().invoke(app, ["down", "dptnone"])
    assert result.exit_code == 2
    assert only_run().name in result.output
    assert process.poll() is None


@needs_networks
def test_networks_of_a_killed_up_are_counted_and_removed_and_no_others(owner: Owner) -> None:
    foreign = f"foreign{os.getpid()}"
    subprocess.run(["ip", "netns", "add", foreign], check=True)
    try:
        process = owner("polite", "networks")
        process.kill()
        process.wait()
        run = only_run()
        carried = runs.status_of(run)["link_bytes"]["server"]
        assert set(carried) == {"storage", "compute"}
        assert carried["storage"]["rx_bytes"] >= 0
        # Only what the record says was made is ever looked into.
        run.about["fabric"] = foreign
        assert runs.link_bytes_of(run) == {}
        command("down")
        left = {path.name for path in Path("/var/run/netns").glob("*")}
        assert foreign in left
        assert left.isdisjoint(run.namespaces)
        assert not any(Path("/sys/class/net", link).exists() for link in run.links)
    finally:
        subprocess.run(["ip", "netns", "delete", foreign], check=True)


# What `up` starts


def test_servers_of_a_role_are_numbered_when_there_are_several() -> None:
    specs = up.servers(up.UpOptions(prefill=1, decode=2, policy="prefill", decode_hicache=False))
    assert [(spec.label, spec.role) for spec in specs] == [
        ("prefill", "prefill"),
        ("decode-1", "decode"),
        ("decode-2", "decode"),
    ]
    assert [spec.hicache for spec in specs] == [True, False, False]
    assert {spec.kv_connector for spec in specs} == {"dualpath"}
    assert {spec.extra_flags for spec in specs} == {("--dualpath-policy", "prefill")}


def test_without_connector_the_servers_are_stock() -> None:
    assert {spec.kv_connector for spec in up.servers(up.UpOptions(connector="none"))} == {None}


def test_a_rate_of_zero_leaves_a_network_unshaped() -> None:
    network = up.network(up.UpOptions(snic_mbit=0, cnic_mbit=1600))
    assert network is not None
    assert (network.snic_bits_per_s, network.cnic_bits_per_s) == (None, 1_600_000_000)
    assert up.network(up.UpOptions(loopback=True)) is None


def test_a_policy_of_stock_servers_is_refused() -> None:
    with pytest.raises(RequirementError, match="--policy"):
        up.check(up.UpOptions(connector="none", policy="split"))


def test_without_root_loopback_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "missing_requirement", lambda: "This needs root: run this as root, or use loopback.")
    with pytest.raises(RequirementError, match=r"or add --loopback\."):
        up.check(up.UpOptions())
    up.check(up.UpOptions(loopback=True))


@pytest.mark.parametrize(
    "options",
    [
        up.UpOptions(),
        up.UpOptions(2, 3, "none", None, "nixl", 0, 800, True, "file", 1.5, "mini_lb", "mla", False, 2048, 2.0),
        up.UpOptions(policy="prefill"),
    ],
)
def test_a_detached_process_is_started_with_the_same_options(
    options: up.UpOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(up, "check", seen.append)
    monkeypatch.setattr(up, "cluster_spec", lambda options, models: None)
    monkeypatch.setattr(up, "stay_up", lambda spec, log_dir, *, detached, say: seen.append((log_dir, detached)))
    command("up", *_arguments(options, tmp_path))
    assert seen == [options, (tmp_path, True)]


@pytest.fixture
def as_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has the program that `up --detach` starts be a test's owner in some mode."""

    def use(mode: str) -> None:
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.testbed.owner {mode}\n')
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return use


def test_detached_it_returns_when_the_run_is_ready(as_owner: Callable[[str], None], tmp_path: Path) -> None:
    as_owner("polite detached")
    said: list[str] = []
    run = up.start_detached([], tmp_path / "logs", say=said.append)
    assert run.owner_alive
    assert said == ["owner is ready"] or not said  # it may be ready before its line is read
    runs.end(run)
    assert list(recorded_runs()) == []
    assert up._background.pop().wait(timeout=10) == 0


def test_detached_it_reports_a_cluster_that_did_not_come_up(as_owner: Callable[[str], None], tmp_path: Path) -> None:
    as_owner("quits")
    with pytest.raises(ProcessError, match=r"status 2.*up\.log"):
        up.start_detached([], tmp_path / "logs", say=lambda line: None)
    assert "no memory" in (tmp_path / "logs" / "up.log").read_text()


def test_detached_and_interrupted_it_leaves_nothing(
    as_owner: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_owner("polite unready")

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        up.start_detached([], tmp_path / "logs", say=interrupt)
    assert list(recorded_runs()) == []


def test_the_description_names_every_address_and_a_request_to_try() -> None:
    text = "\n".join(up.description("dptx", {"prefill": "http://a:1", "router": "http://b:2"}, Path("logs")))
    assert "http://a:1" in text
    assert "curl -s http://b:2/generate" in text
