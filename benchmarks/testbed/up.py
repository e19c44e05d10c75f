"""A cluster that stays up until it is told to end: in this process, or in one of its own in the background."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.testbed.cluster import Cluster, ClusterSpec
from benchmarks.testbed.errors import ProcessError, RequirementError
from benchmarks.testbed.model import identity_mla_model, identity_model, speed_model
from benchmarks.testbed.network import NetworkSpec, missing_requirement
from benchmarks.testbed.router import RouterKind
from benchmarks.testbed.runs import UP
from benchmarks.testbed.servers import Role, ServerSpec, TransferBackend
from benchmarks.testbed.state import RunState, recorded_runs
from benchmarks.testbed.store import REPOSITORY, StoreSpec

ModelKind = Literal["identity", "speed", "mla"]
MODELS: dict[ModelKind, Callable[[Path], Path]] = {
    "identity": identity_model,
    "speed": speed_model,
    "mla": identity_mla_model,
}
_WATCH_S = 0.5
_OWNER_LOG = "up.log"
_background: list[subprocess.Popen[bytes]] = []  # meant to outlive this process; dropped, Popen objects warn


@dataclass(frozen=True)
class UpOptions:
    """What `up` was asked for; rates in Mbit/s, 0 leaves that network unshaped."""

    prefill: int = 1
    decode: int = 1
    connector: str = "dualpath"
    policy: str | None = None
    transfer: TransferBackend = "mooncake"
    snic_mbit: int = 200
    cnic_mbit: int = 1600
    loopback: bool = False
    store: Literal["mooncake", "file"] = "mooncake"
    store_gib: float = 3.0
    router: RouterKind = "gateway"
    model: ModelKind = "identity"
    decode_hicache: bool = True
    max_total_tokens: int = 24_000
    hicache_ratio: float = 1.5


def check(options: UpOptions) -> None:
    """Raises RequirementError with one sentence for what cannot be."""
    if options.policy is not None and options.connector == "none":
        raise RequirementError("--policy chooses who reads with --connector dualpath; stock servers have no policy.")
    refusal = None if options.loopback else missing_requirement()
    if refusal is not None:
        raise RequirementError(refusal.replace("use loopback", "add --loopback"))


def servers(options: UpOptions) -> list[ServerSpec]:
    """Prefill servers first. One of a role is called like its role, several are numbered."""

    def of_role(role: Role, count: int) -> Iterator[ServerSpec]:
        for number in range(1, count + 1):
            yield ServerSpec(
                role=role,
                name=role if count == 1 else f"{role}-{number}",
                kv_connector=None if options.connector == "none" else options.connector,
                hicache=role == "prefill" or options.decode_hicache,
                max_total_tokens=options.max_total_tokens,
                hicache_ratio=options.hicache_ratio,
                transfer_backend=options.transfer,
                extra_flags=() if options.policy is None else ("--dualpath-policy", options.policy),
            )

    return [*of_role("prefill", options.prefill), *of_role("decode", options.decode)]


def network(options: UpOptions) -> NetworkSpec | None:
    """The networks, None on loopback."""
    if options.loopback:
        return None
    return NetworkSpec(options.snic_mbit * 1_000_000 or None, options.cnic_mbit * 1_000_000 or None)


def cluster_spec(options: UpOptions, models: Path) -> ClusterSpec:
    """The cluster; makes the model in `models` if it is not there yet."""
    return ClusterSpec(
        model=MODELS[options.model](models),
        servers=servers(options),
        store=StoreSpec(kind=options.store, capacity_bytes=int(options.store_gib * (1 << 30))),
        router=options.router,
        network=network(options),
    )


def new_log_dir() -> Path:
    """A directory for the logs of a run that starts now."""
    return REPOSITORY / "out" / "testbed" / time.strftime("%Y%m%d-%H%M%S")


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program as Ctrl-C does: what is up is taken down."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = [(number, signal.signal(number, interrupt)) for number in (signal.SIGTERM, signal.SIGHUP)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def stay_up(spec: ClusterSpec, log_dir: Path, *, detached: bool, say: Callable[[str], None]) -> None:
    """Bring a cluster up and watch over it until KeyboardInterrupt, which takes it down and is not raised."""
    with contextlib.suppress(KeyboardInterrupt), ended_by_signals(), Cluster(spec, log_dir=log_dir, say=say) as cluster:
        cluster.describe(command=UP, detached=detached, ready=True)
        for line in description(cluster.run_name, {n: c.base_url for n, c in cluster.clients.items()}, log_dir):
            say(line)
        if not detached:
            say("Ctrl-C takes it down.")
        _watch(cluster, say)
    say("Everything is down.")


def _watch(cluster: Cluster, say: Callable[[str], None]) -> None:
    """Say once of each process that it ended. The rest stays up: to see what then happens may be the point."""
    ended: set[str] = set()
    while True:
        time.sleep(_WATCH_S)
        for name, process in cluster.processes.items():
            if name not in ended and not process.running:
                ended.add(name)
                say(f"{name} ended with status {process.popen.returncode}; see {process.log_path}.")


def description(name: str, urls: dict[str, str], log_dir: Path) -> list[str]:
    """What a user needs of a cluster that is up."""
    width = max(map(len, urls))
    lines = [f"{name} is up; logs are in {log_dir}."]
    lines += [f"  {server:<{width}}  {url}" for server, url in urls.items()]
    body = json.dumps({"text": "The quick brown fox", "sampling_params": {"max_new_tokens": 8, "temperature": 0}})
    router = urls.get("router", next(iter(urls.values())))
    lines += ["Try:", f"  curl -s {router}/generate -H 'Content-Type: application/json' -d '{body}'"]
    return lines


def start_detached(arguments: Sequence[str], log_dir: Path, *, say: Callable[[str], None]) -> RunState:
    """Run `up` with these arguments in a process of its own, and return when all is ready.

    Raises ProcessError, with the end of what it said, when it ends first. Interrupted, it is ended with all it started.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    log_path = log_dir / _OWNER_LOG
    with log_path.open("wb") as log:
        owner = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.testbed", "up", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _background.append(owner)
    try:
        return _await_ready(owner, log_path, say)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            owner.terminate()
        owner.wait()
        raise


def _await_ready(owner: subprocess.Popen[bytes], log_path: Path, say: Callable[[str], None]) -> RunState:
    shown = 0
    while True:
        lines = log_path.read_text(errors="replace").splitlines(keepends=True)
        for line in lines[shown:]:
            if line.endswith("\n"):
                say(line.rstrip("\n"))
                shown += 1
        for run in recorded_runs():
            if run.owner_pid == owner.pid and run.about.get("ready"):
                return run
        if owner.poll() is not None:
            raise ProcessError(f"The cluster did not come up (status {owner.returncode}); {log_path} says why.")
        time.sleep(_WATCH_S)
