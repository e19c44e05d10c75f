"""What a run has made, written down before it is made, so that a crash leaves a list to clean up.

One JSON file per run below a directory that only this user can write. `clean_up` removes exactly what such a file
names, and a process is signalled only while it is still the one that was started (its start time is recorded too).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.testbed.errors import TestbedError

PREFIX = "dpt"  # of every namespace and link; with a process id in base 36 it fits the 15 characters of a link name


def state_dir() -> Path:
    """Directory of the state files, created with access for this user alone.

    Raises TestbedError when somebody else owns it: its files are instructions to kill and delete.
    """
    path = Path(tempfile.gettempdir()) / f"sglang-dualpath-testbed-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    info = path.lstat()
    if info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise TestbedError(f"{path} is not a directory of this user alone; remove it first.")
    return path


def start_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, or None when there is no such process (or only a zombie)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the command name may hold spaces and parentheses
    return None if fields[0] in "ZX" else int(fields[19])


def _base36(number: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    text = ""
    while number:
        number, rest = divmod(number, 36)
        text = digits[rest] + text
    return text or "0"


@dataclass
class RunState:
    """The record of one run; every `add_*` is on disk before it returns.

    `process_names` (by process id as text) and `about` (addresses, log directory) serve people who ask; nothing is
    ended or removed because of them.
    """

    name: str
    owner_pid: int
    owner_start: int
    namespaces: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    processes: list[tuple[int, int]] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)
    process_names: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @staticmethod
    def new() -> RunState:
        """A record with a name that no other run has (prefix, process id, two random characters)."""
        pid = os.getpid()
        state = RunState(f"{PREFIX}{_base36(pid)}{secrets.token_hex(1)}", pid, start_ticks(pid) or 0)
        while state.path.exists():  # one process may have several clusters up
            state.name = f"{PREFIX}{_base36(pid)}{secrets.token_hex(1)}"
        state._save()
        return state

    @property
    def path(self) -> Path:
        return state_dir() / f"{self.name}.json"

    @property
    def owner_alive(self) -> bool:
        return start_ticks(self.owner_pid) == self.owner_start

    def add_namespace(self, name: str) -> None:
        self._append(self.namespaces, name)

    def add_link(self, name: str) -> None:
        self._append(self.links, name)

    def add_directory(self, path: Path) -> None:
        self._append(self.directories, str(path))

    def add_process(self, pid: int, name: str = "") -> None:
        """Record a process that leads a process group of its own."""
        started = start_ticks(pid)
        if started is not None:
            with self._lock:
                self.processes.append((pid, started))
                self.process_names[str(pid)] = name
            self._save()

    def describe(self, **about: Any) -> None:
        """Add to what `status` says of this run; values must be JSON."""
        with self._lock:
            self.about.update(about)
        self._save()

    def forget_namespace(self, name: str) -> None:
        self._remove(self.namespaces, name)

    def forget_link(self, name: str) -> None:
        self._remove(self.links, name)

    def discard(self) -> None:
        """Remove the record: everything it names is gone."""
        self.path.unlink(missing_ok=True)

    def _append(self, items: list[str], item: str) -> None:
        with self._lock:
            items.append(item)
        self._save()

    def _remove(self, items: list[str], item: str) -> None:
        with self._lock:
            if item in items:
                items.remove(item)
        self._save()

    def _save(self) -> None:
        with self._lock:
            content = {
                "name": self.name,
                "owner_pid": self.owner_pid,
                "owner_start": self.owner_start,
                "namespaces": self.namespaces,
                "links": self.links,
                "processes": self.processes,
                "directories": self.directories,
                "process_names": self.process_names,
                "about": self.about,
            }
            fresh = self.path.with_suffix(".new")
            fresh.write_text(json.dumps(content))
            fresh.replace(self.path)


def recorded_runs() -> Iterator[RunState]:
    """Every run with a readable record."""
    for path in sorted(state_dir().glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(path.read_text())
            content["processes"] = [(int(pid), int(started)) for pid, started in content["processes"]]
            yield RunState(**content)


def tool_environment() -> dict[str, str]:
    """This process's environment, with the directories of `ip` and `tc` on the path, which Debian's users lack."""
    return {**os.environ, "PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"}


def remove_namespace(name: str) -> None:
    """Delete a namespace with all links that have an end in it; no error when it is gone already."""
    if Path("/var/run/netns", name).exists():
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, env=tool_environment())


def remove_link(name: str) -> None:
    """Delete a link of this namespace; no error when it is gone already."""
    if Path("/sys/class/net", name).exists():
        subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True, env=tool_environment())


def signal_group(pid: int, number: int) -> bool:
    """Signal the process group led by `pid`; False when no process is left in it."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # only zombies of another user can be left: nothing to signal
        return False
    return True


def stop_groups(pids: list[int], *, grace_s: float) -> None:
    """End process groups: wake and SIGTERM their leaders all at once, SIGKILL what is left after `grace_s` seconds.

    Leaders end their children. SGLang takes a child that gets the signal by itself for a crash, and sleeps over it.
    """
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGTERM)
        signal_group(pid, signal.SIGCONT)
    deadline = time.monotonic() + grace_s
    orphaned: set[int] = set()
    left = [pid for pid in pids if _group_lives(pid)]
    while left and time.monotonic() < deadline:
        for pid in left:
            if pid not in orphaned and start_ticks(pid) is None:
                orphaned.add(pid)
                signal_group(pid, signal.SIGTERM)
        time.sleep(0.05)
        left = [pid for pid in left if _group_lives(pid)]
    for pid in left:
        signal_group(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5.0
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [pid for pid in left if _group_lives(pid)]


def _group_lives(pid: int) -> bool:
    """True while a process of the group is neither gone nor a zombie."""
    if not signal_group(pid, 0):
        return False
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == pid and fields[0] not in "ZX":
                return True
    return False


def clean_up(state: RunState) -> None:
    """Remove what a run has made: its processes, links, namespaces and directories, then its record."""
    # A leader may be gone while its children live on: they keep its id as their group, which nobody else can then get.
    ours = [pid for pid, started in state.processes if start_ticks(pid) in (started, None) and _group_lives(pid)]
    stop_groups(ours, grace_s=5.0)
    for link in state.links:
        remove_link(link)
    for namespace in state.namespaces:
        remove_namespace(namespace)
    for directory in state.directories:
        shutil.rmtree(directory, ignore_errors=True)
    state.discard()


def clean_up_dead_runs() -> list[str]:
    """Clean up after runs whose process is gone; the names of those runs."""
    cleaned = []
    for state in recorded_runs():
        if not state.owner_alive:
            clean_up(state)
            cleaned.append(state.name)
    return cleaned
