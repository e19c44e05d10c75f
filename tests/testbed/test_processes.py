"""Starting and ending processes, and cleaning up after runs that could not do so themselves."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.testbed import state as state_module
from benchmarks.testbed.errors import ProcessError, TestbedError
from benchmarks.testbed.processes import PortPicker, Processes, listens, wait_until
from benchmarks.testbed.state import RunState, clean_up_dead_runs, recorded_runs, start_ticks

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("started", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _own_state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on this machine that are really going on stay unseen."""
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(state_module, "state_dir", lambda: directory)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    started = Processes(tmp_path / "logs", RunState.new())
    yield started
    started.close(grace_s=0.1)


def test_a_group_that_ignores_sigterm_is_killed_with_its_children(processes: Processes) -> None:
    process = processes.start("stubborn", [sys.executable, "-c", STUBBORN])
    wait_until(lambda: "started" in process.log(), [process], what="it says so", deadline_s=20)
    assert len(process.members()) == 2
    processes.stop(process, grace_s=0.2)
    assert process.members() == []


def test_a_frozen_process_is_ended_too(processes: Processes) -> None:
    process = processes.start("frozen", ["sleep", "60"])
    process.signal(signal.SIGSTOP)
    processes.close(grace_s=5.0)
    assert process.popen.returncode == -signal.SIGTERM


def test_what_a_process_leaves_in_its_temporary_directory_goes_with_it(processes: Processes) -> None:
    leaves = "import tempfile, time; print(tempfile.mkdtemp(), flush=True); time.sleep(60)"
    process = processes.start("untidy", [sys.executable, "-c", leaves])
    wait_until(lambda: process.log().endswith("\n"), [process], what="it has left something", deadline_s=20)
    left = Path(process.log().strip())
    assert left.is_dir()
    assert left.parent.parent == Path(tempfile.gettempdir())
    processes.stop(process)
    assert not left.parent.exists()


def test_processes_end_in_reverse_order(processes: Processes, tmp_path: Path) -> None:
    note = tmp_path / "order"
    for name in ("first", "second"):
        script = f"trap 'echo {name} >> {note}; exit' TERM; echo up; while :; do sleep 0.05; done"
        process = processes.start(name, ["bash", "-c", script])
        wait_until(lambda process=process: "up" in process.log(), [process], what="it says so", deadline_s=20)  # type: ignore[misc]
    processes.close(grace_s=10.0)
    assert note.read_text().split() == ["second", "first"]


def test_an_early_end_is_reported_with_the_end_of_the_log(processes: Processes) -> None:
    process = processes.start("broken", ["bash", "-c", "echo no such flag; exit 3"])
    with pytest.raises(ProcessError, match=r"status 3 before it is ready.*\n.*no such flag"):
        wait_until(lambda: False, [process], what="it is ready", deadline_s=20)


def test_a_deadline_is_reported_with_the_end_of_the_log(processes: Processes) -> None:
    process = processes.start("slow", ["bash", "-c", "echo still loading; sleep 60"])
    wait_until(lambda: "loading" in process.log(), [process], what="it says so", deadline_s=20)
    with pytest.raises(ProcessError, match="still loading"):
        wait_until(lambda: False, [process], what="it is ready", deadline_s=0.1)


def test_a_listening_port_is_seen(processes: Processes) -> None:
    port = PortPicker().take()
    script = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(60)"
    process = processes.start("server", [sys.executable, "-c", script])
    wait_until(lambda: listens(process, port), [process], what="it listens", deadline_s=20)
    assert not listens(process, PortPicker().take())


def test_ports_differ() -> None:
    picker = PortPicker()
    assert len({picker.take() for _ in range(20)}) == 20


def test_a_run_whose_process_died_is_cleaned_up(tmp_path: Path) -> None:
    directory = tmp_path / "pages"
    directory.mkdir()
    run = RunState.new()
    run.add_directory(directory)
    sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
    run.add_process(sleeper.pid)
    run.owner_start -= 1  # another process had this id then
    run.forget_link("none")  # writes the record
    assert clean_up_dead_runs() == [run.name]
    assert sleeper.wait(timeout=10) == -signal.SIGTERM
    assert not directory.exists()
    assert list(recorded_runs()) == []


def test_a_living_run_is_left_alone() -> None:
    run = RunState.new()
    assert clean_up_dead_runs() == []
    run.discard()


def test_a_process_that_took_over_a_recorded_id_is_left_alone() -> None:
    run = RunState.new()
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    run.processes.append((stranger.pid, (start_ticks(stranger.pid) or 0) - 1))
    run.owner_start -= 1
    run.forget_link("none")
    clean_up_dead_runs()
    time.sleep(0.1)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_a_state_directory_that_others_can_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    path = state_module.state_dir()
    path.chmod(0o777)
    with pytest.raises(TestbedError, match="not a directory of this user alone"):
        state_module.state_dir()
