"""Runs on this machine, as their records say: what is left of each, and ending one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.testbed.errors import NetworkError, RequirementError, TestbedError
from benchmarks.testbed.network import Direction, NetworkName, read_link_bytes
from benchmarks.testbed.state import RunState, clean_up, recorded_runs, start_ticks

UP = "up"  # what `about["command"]` says of runs that `python -m benchmarks.testbed up` owns
_OWNER_DEADLINE_S = 40.0  # an owner ends its servers, the store and the networks one after the other
_POLL_S = 0.1


@dataclass(frozen=True)
class ProcessStatus:
    """One recorded process, which leads a process group."""

    name: str
    pid: int
    alive: bool


def processes_of(run: RunState) -> list[ProcessStatus]:
    """Processes in the order of their start. Of those that were replaced (same name) the last one only."""
    latest: dict[str, ProcessStatus] = {}
    for pid, started in run.processes:
        name = run.process_names.get(str(pid)) or f"process {pid}"
        latest[name] = ProcessStatus(name, pid, start_ticks(pid) == started)
    return list(latest.values())


def link_bytes_of(run: RunState) -> dict[tuple[str, NetworkName, Direction], int]:
    """Byte counters of a run's links; empty on loopback, and when the links are gone or only root may read them."""
    fabric = run.about.get("fabric")
    # A record is only believed about what it says it made.
    if fabric not in run.namespaces or not Path("/var/run/netns", str(fabric)).exists():
        return {}
    try:
        return read_link_bytes(fabric, {(node, network): port for node, network, port in run.about.get("links", [])})
    except (NetworkError, KeyError):
        return {}


def status_of(run: RunState) -> dict[str, Any]:
    """Everything `status --json` says of a run."""
    carried: dict[str, dict[str, dict[str, int]]] = {}
    for (node, network, direction), count in link_bytes_of(run).items():
        carried.setdefault(node, {}).setdefault(network, {})[f"{direction}_bytes"] = count
    return {
        "name": run.name,
        "owner": {"pid": run.owner_pid, "alive": run.owner_alive},
        "command": run.about.get("command"),
        "detached": bool(run.about.get("detached")),
        "ready": bool(run.about.get("ready")),
        "processes": [vars(process) for process in processes_of(run)],
        "urls": run.about.get("urls", {}),
        "log_dir": run.about.get("log_dir"),
        "namespaces": run.namespaces,
        "links": run.links,
        "link_bytes": carried,
    }


def find_run(name: str) -> RunState:
    """The run of this name. Raises RequirementError, which names those that there are."""
    runs = {run.name: run for run in recorded_runs()}
    if name not in runs:
        known = ", ".join(runs) if runs else "there is none"
        raise RequirementError(f"No run is called {name!r}: {known}.")
    return runs[name]


def runs_to_end(name: str | None, *, everything: bool) -> Iterator[RunState]:
    """The run of that name; else all of them, or those that nobody else will end.

    These are runs whose process is gone and runs of `up --detach`. A demo or a benchmark in progress, and an `up` in
    somebody's terminal, are ended by name only.
    """
    if name is not None:
        yield find_run(name)
        return
    for run in recorded_runs():
        if run.owner_pid != os.getpid() and (everything or not run.owner_alive or run.about.get("detached")):
            yield run


def end(run: RunState) -> None:
    """Remove all that a run's record names. An `up` that lives is asked to do so itself, and killed if it does not.

    Raises TestbedError when something of it is still there afterwards.
    """
    if run.about.get("command") == UP:
        _end_owner(run)
    # Its owner may have removed everything, and added to its record before it did.
    left = next((other for other in recorded_runs() if other.name == run.name), None)
    if left is not None:
        clean_up(left)
    stay = [space for space in run.namespaces if Path("/var/run/netns", space).exists()]
    if stay:
        raise TestbedError(f"{run.name}: namespaces {', '.join(stay)} could not be removed: run this as root.")


def _end_owner(run: RunState) -> None:
    for number, wait_s in ((signal.SIGTERM, _OWNER_DEADLINE_S), (signal.SIGKILL, 5.0)):
        deadline_s = time.monotonic() + wait_s
        if not _signal_owner(run, number):
            return
        while run.owner_alive and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)


def _signal_owner(run: RunState, number: signal.Signals) -> bool:
    """Signal a run's owner, woken if it is frozen; False when it is gone. Its start time tells it from a successor."""
    if not run.owner_alive:
        return False
    try:
        os.kill(run.owner_pid, number)
        os.kill(run.owner_pid, signal.SIGCONT)
    except ProcessLookupError:
        return False
    return True
