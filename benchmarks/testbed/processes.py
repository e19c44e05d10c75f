"""Starting, watching and ending the processes of a run."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.testbed.errors import ProcessError
from benchmarks.testbed.state import RunState, signal_group, stop_groups

LOG_LINES_SHOWN = 25
GRACE_S = 2.5  # SGLang ends its own processes within a second, then waits five for a crash report that nobody reads
# Mounts of the process's own, at a place that every Debian has.
_SYSFS_OF_THE_NAMESPACE = (
    "mount -t sysfs sysfs /mnt && mount --rbind /sys/fs/cgroup /mnt/fs/cgroup && mount --rbind /mnt /sys && "
    'exec "$@"; echo "The links of this namespace cannot be shown in /sys: mounting was refused." >&2; exit 1'
)
LOG_LINE_CHARACTERS = 400
_POLL_S = 0.2
_TCP_LISTEN = "0A"  # state in /proc/net/tcp
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy: all is local


@dataclass
class Process:
    """A started process that leads its own process group, and its log."""

    name: str
    command: tuple[str, ...]
    log_path: Path
    popen: subprocess.Popen[bytes]
    temporary: Path
    stage: str = ""

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def log(self) -> str:
        """All it has written so far."""
        return self.log_path.read_text(errors="replace")

    def log_tail(self, lines: int = LOG_LINES_SHOWN) -> str:
        return "\n".join(line[:LOG_LINE_CHARACTERS] for line in self.log().splitlines()[-lines:])

    def members(self) -> list[int]:
        """Process ids of its group that are alive, itself included."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[2]) == self.pid and fields[0] not in "ZX":
                    found.append(int(entry.name))
        return sorted(found)

    def io_bytes(self) -> tuple[int, int]:
        """Bytes that the whole group has (read, written) by system calls, files and pipes alike."""
        read = written = 0
        for pid in self.members():
            try:
                text = Path(f"/proc/{pid}/io").read_text()
            except OSError:
                continue
            values = dict(line.split(": ") for line in text.splitlines())
            read += int(values["rchar"])
            written += int(values["wchar"])
        return read, written

    def signal(self, number: int) -> None:
        """Signal every process of the group (SIGSTOP freezes a server, SIGCONT wakes it, SIGKILL kills it)."""
        signal_group(self.pid, number)


class Processes:
    """The processes of one run. `close` ends them in reverse order of their start; it may be called twice."""

    def __init__(self, log_dir: Path, state: RunState) -> None:
        self._log_dir = log_dir
        self._state = state
        self._started: list[Process] = []

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        namespace: str | None = None,
        stage: str = "",
        sees_links: bool = False,
    ) -> Process:
        """Start a command in a process group of its own, in a network namespace if one is named.

        Its output goes to NAME.log. Neighbours of the same `stage` are ended together. `env` replaces the whole
        environment but for TMPDIR: what it leaves there is removed when it has ended, as SGLang's processes leave a
        dozen files when they are killed.

        The namespace is entered by `nsenter --net`, which unlike `ip netns exec` leaves the mounts alone: SGLang sizes
        its pools by the control group's files. With `sees_links` /sys shows the namespace's links, and those files all
        the same.
        """
        if namespace is not None:
            view = ["unshare", "--mount", "sh", "-c", _SYSFS_OF_THE_NAMESPACE, "sh"] if sees_links else []
            command = ["nsenter", f"--net=/var/run/netns/{namespace}", *view, *command]
        temporary = Path(tempfile.mkdtemp(prefix=f"{self._state.name}-{name}-"))
        self._state.add_directory(temporary)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        log_path = self._log_dir / f"{name}.log"
        with log_path.open("wb") as log:
            popen = subprocess.Popen(
                command,
                env={**(os.environ if env is None else env), "TMPDIR": str(temporary)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A Ctrl-C at the terminal reaches us alone, and we end them in order. A group, not a session: with
                # autogroups (most distributions' default) Linux gives each session an equal share of the cores,
                # whatever its threads' nice values.
                process_group=0,
            )
        process = Process(name, tuple(command), log_path, popen, temporary, stage)
        self._started.append(process)
        self._state.add_process(popen.pid, name)
        return process

    def stop(self, process: Process, *, grace_s: float = GRACE_S) -> None:
        """End one process group: SIGTERM, wait, SIGKILL."""
        self._stop([process], grace_s=grace_s)

    @property
    def started(self) -> list[Process]:
        """All that were started and not ended, in the order of their start."""
        return list(self._started)

    def stop_all(self, processes: Sequence[Process], *, grace_s: float = GRACE_S) -> None:
        """End several process groups together."""
        self._stop(list(processes), grace_s=grace_s)

    def close(self, *, grace_s: float = GRACE_S) -> None:
        """End all of them, the last started first; neighbours of one stage together."""
        newest_first = list(reversed(self._started))
        for _, stage in itertools.groupby(newest_first, key=lambda process: process.stage or process.name):
            self._stop(list(stage), grace_s=grace_s)

    def _stop(self, processes: list[Process], *, grace_s: float) -> None:
        stop_groups([process.pid for process in processes], grace_s=grace_s)
        for process in processes:
            process.popen.wait(timeout=10.0)
            shutil.rmtree(process.temporary, ignore_errors=True)
            if process in self._started:
                self._started.remove(process)


def wait_until(ready: Callable[[], bool], processes: Sequence[Process], *, what: str, deadline_s: float) -> None:
    """Poll `ready` until it is true. Raises ProcessError, with the end of the logs, when one ends or time is up."""
    end = time.monotonic() + deadline_s
    while not ready():
        for process in processes:
            if not process.running:
                raise ProcessError(
                    f"{process.name} ended with status {process.popen.returncode} before {what}. "
                    f"Its log ({process.log_path}) ends:\n{process.log_tail()}"
                )
        if time.monotonic() >= end:
            logs = "\n".join(f"{process.name} ({process.log_path}):\n{process.log_tail()}" for process in processes)
            raise ProcessError(f"Not after {deadline_s:.0f} s: {what}. The logs end:\n{logs}")
        time.sleep(_POLL_S)


def http_ready(url: str) -> bool:
    """True when a GET answers with status 200 within two seconds."""
    try:
        with _opener.open(url, timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def listens(process: Process, port: int) -> bool:
    """True when somebody listens on a TCP port in the network namespace of a process, ours or not."""
    for table in ("tcp", "tcp6"):
        try:
            rows = Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            _, local, _, state, *_ = row.split()
            if state == _TCP_LISTEN and int(local.rpartition(":")[2], 16) == port:
                return True
    return False


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM meanwhile (in the main thread; elsewhere nothing changes): a clean-up takes seconds."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class PortPicker:
    """Free TCP ports that nobody else picks.

    SGLang takes some at random from 22000 to 29999, Mooncake's engine and store from 12300 to 17000, the kernel for
    outgoing connections from 32768 on: a port of theirs may be taken between our look and the server's.
    """

    def __init__(self, first: int = 17_100, last: int = 21_900) -> None:
        self._next = first + os.getpid() * 131 % (last - first)
        self._first, self._last = first, last

    def take(self, host: str = "127.0.0.1") -> int:
        """A port that could be bound just now; every call gives another one."""
        for _ in range(self._last - self._first):
            port = self._next
            self._next = self._first if port >= self._last else port + 1
            with socket.socket() as probe:
                try:
                    probe.bind((host, port))
                except OSError:
                    continue
            return port
        raise ProcessError(f"No TCP port between {self._first} and {self._last} is free.")


def clean_environment(base: Mapping[str, str]) -> dict[str, str]:
    """An environment for servers: `base` without proxies, access to model hubs, or settings of other runs."""
    env = {
        key: value
        for key, value in base.items()
        if key.lower() not in {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}
        and not key.startswith(("SGLANG_", "MOONCAKE_", "MC_", "NIXL_", "UCX_", "PROMETHEUS_MULTIPROC"))
    }
    return env | {"no_proxy": "*", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
