"""Runs the systems of a preset in turns, A B C A B C ..., each with a store of its own that stays up throughout."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.compare import systems
from benchmarks.compare.schema import Repetition, Result, Settings, Sustained
from benchmarks.compare.summary import summarise
from benchmarks.compare.targets import DeployedTarget, TestbedTarget
from benchmarks.compare.turn import Say, Turns
from benchmarks.load import traces
from benchmarks.load.workload import Workload
from benchmarks.testbed import Cluster, RequirementError, TestbedError, missing_requirement, speed_model
from benchmarks.testbed.cluster import available_bytes
from benchmarks.testbed.state import clean_up_dead_runs
from benchmarks.testbed.store import REPOSITORY

_PACKAGES = ("sglang", "sglang-dualpath", "sglang-router", "mooncake-transfer-engine",
             "mooncake-transfer-engine-non-cuda", "nixl", "torch")  # fmt: skip


@dataclass(frozen=True)
class Deployment:
    """Servers that run already, and the one system that they are."""

    router_url: str
    servers: Mapping[str, str]
    devices: Mapping[str, str]
    link_mbit: int | None = None


def workload_of(settings: Settings) -> Workload:
    """What agents play. Raises TraceError when the trace cannot be used."""
    shape = traces.Shape(
        agents=settings.agents,
        rounds=settings.rounds,
        contexts=settings.contexts,
        longest_tokens=settings.longest_tokens,
        appended_tokens=settings.appended_tokens,
        generated_tokens=settings.generated_tokens,
        seed=settings.seed,
    )
    if settings.trace is not None:
        return traces.load(settings.trace, shape)
    return traces.synthetic_low_reuse(shape) if settings.low_reuse else traces.synthetic(shape)


def run(settings: Settings, *, out: Path, say: Say, keep_servers: bool = False) -> Result:
    """Bring the systems up in turns and measure them. Raises TestbedError or TraceError when that is impossible."""
    systems.check_systems(settings)
    if keep_servers and len(settings.systems) > 1:
        raise systems.UnknownSystemError("--keep-servers needs a single system: memory holds one set of servers.")
    if settings.namespaces and (refusal := missing_requirement()):
        raise RequirementError(refusal)
    clean_up_dead_runs()  # whose servers would hold the memory that is counted next
    start = time.monotonic()
    workload = workload_of(settings)
    model = speed_model(REPOSITORY / "out" / "models")
    specs = {system: systems.cluster_spec(system, settings, workload, model) for system in settings.systems}
    _check_memory(systems.memory_budget(settings, specs), say)
    _describe(settings, workload, say)
    repetitions: list[Repetition] = []
    sustained: dict[str, Sustained] = {}
    with contextlib.ExitStack() as stack:
        turns = []
        for system, spec in specs.items():
            log_dir = out / "logs" / system.replace(":", "-")
            cluster = stack.enter_context(Cluster(spec, log_dir=log_dir, say=lambda _: None, suspended=True))
            turns.append(Turns(system, TestbedTarget(cluster), settings, workload, say))
        failure = _take_turns(turns, settings, repetitions, sustained, say, keep_servers=keep_servers)
    return summarise(settings, workload, repetitions, sustained=sustained, versions=versions() | {"model": model.name},
                     failure=failure, total_s=round(time.monotonic() - start, 1))  # fmt: skip


def run_deployed(settings: Settings, deployment: Deployment, *, say: Say) -> Result:
    """Measure servers that run already; nothing is started, ended or shaped."""
    systems.check_systems(settings)
    if len(settings.systems) != 1:
        raise systems.UnknownSystemError("A deployment is one system: say with --systems which (and --merge later).")
    prefill_servers, decode_servers = _counted(deployment.servers)
    settings = msgspec.structs.replace(
        settings, deployed=True, prefill_servers=prefill_servers, decode_servers=decode_servers
    )
    start = time.monotonic()
    workload = workload_of(settings)
    link_bytes_per_s = None if deployment.link_mbit is None else deployment.link_mbit * 1e6 / 8
    target = DeployedTarget(deployment.router_url, deployment.servers, deployment.devices, link_bytes_per_s)
    repetitions: list[Repetition] = []
    sustained: dict[str, Sustained] = {}
    _describe(settings, workload, say)
    turns = [Turns(settings.systems[0], target, settings, workload, say)]
    with contextlib.closing(target):
        failure = _take_turns(turns, settings, repetitions, sustained, say, keep_servers=True)
    return summarise(settings, workload, repetitions, sustained=sustained, versions=versions(), failure=failure,
                     total_s=round(time.monotonic() - start, 1))  # fmt: skip


def _counted(servers: Mapping[str, str]) -> tuple[int, int]:
    """Prefill and decode servers of a deployment. Raises RequirementError unless their names are those of a system."""
    counts = [sum(name.startswith(role) for name in servers) for role in ("prefill", "decode")]
    names = [*systems.server_names("prefill", counts[0]), *systems.server_names("decode", counts[1])]
    if not all(counts) or set(names) != set(servers):
        raise RequirementError(
            f"Servers are named prefill, or prefill1, prefill2 and so on if there are several, and decode alike; "
            f"these are {', '.join(servers)}."
        )
    return counts[0], counts[1]


def versions() -> dict[str, str]:
    """Of everything that a figure depends on."""
    found = {"python": platform.python_version(), "kernel": platform.release(), "machine": platform.machine()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    commit = subprocess.run(["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"],
                            capture_output=True, text=True, check=False)  # fmt: skip
    if commit.returncode == 0:
        found["commit"] = commit.stdout.strip()
    return found | {"command": " ".join(["benchmarks.compare", *sys.argv[1:]])}


def _take_turns(
    turns: list[Turns], settings: Settings, repetitions: list[Repetition], sustained: dict[str, Sustained], say: Say,
    *, keep_servers: bool,
) -> str | None:  # fmt: skip
    """What ended the run early, if anything was measured before: half an hour's work is kept, as an invalid result."""
    for number in range(settings.repetitions):
        for turn in turns:
            try:
                if settings.mode == "online":
                    sustained[turn.system] = turn.sustained()
                    say(f"{turn.system}: sustains {sustained[turn.system].agents_per_s:.3f} agents/s")
                    continue
                last = number + 1 == settings.repetitions
                repetition = turn.play(number, keep=keep_servers and not last)
            except (TestbedError, subprocess.TimeoutExpired) as error:
                if not repetitions and not sustained:
                    raise
                return f"the run ended early, in repetition {number + 1} of {turn.system}: {error}"
            repetitions.append(repetition)
            say(_spoken(repetition))
    return None


def _spoken(repetition: Repetition) -> str:
    busy = ", ".join(f"{name} {share:.0%}" for name, share in repetition.snic_busy.items())
    measured = repetition.measured
    ttft = "-" if measured.ttft_p50_s is None else f"{measured.ttft_p50_s:.1f}"
    return (
        f"{repetition.system}: job {measured.jct_s:.1f} s, TTFT p50 {ttft} s, {repetition.hit_tokens:,} hit tokens, "
        f"storage links {busy or 'unknown'}, cores {repetition.cpu_busy:.0%}, {repetition.failed} failed"
    )


def _check_memory(budget: Mapping[str, int], say: Say) -> None:
    total, available = sum(budget.values()), available_bytes()
    parts = ", ".join(f"{name} {amount / 1e9:.1f}" for name, amount in budget.items())
    say(f"Memory budget: {total / 1e9:.1f} GB of {available / 1e9:.1f} GB available ({parts}).")
    if total > available:
        raise RequirementError(
            f"This needs about {total / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are available: "
            "take fewer systems (--systems), agents or repetitions."
        )


def _describe(settings: Settings, workload: Workload, say: Say) -> None:
    longest = max(round_.prompt_tokens for trajectory in workload.trajectories for round_ in trajectory.rounds)
    window = int(settings.pools.prefill_tokens * settings.pools.prefill_ratio / 2)
    links = "links without limit" if settings.snic_mbit is None else f"SNIC {settings.snic_mbit} Mbit/s"
    if settings.cnic_mbit is not None:
        links += f", CNIC {settings.cnic_mbit} Mbit/s"
    if not settings.namespaces:
        links = "on loopback or deployed servers: no links of the testbed"
    requests = settings.passes * workload.requests
    say(
        f"{settings.preset}: {', '.join(settings.systems)}; {settings.prefill_servers}P{settings.decode_servers}D, "
        f"{links}; {workload.name}, {len(workload.trajectories)} agents, {requests} requests per repetition, prompts "
        f"up to {longest:,} tokens, {settings.arrivals}; a prefill server's prefetch window holds "
        f"{window // max(1, longest)} of the longest."
    )
