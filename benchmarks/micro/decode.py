"""Time between tokens of a decode server while it helps to load other prompts, against while it does not.

One long answer streams. Meanwhile prompts are loaded from storage: by the prefill server alone (`prefill`), or by both
servers (`split`), or there is nothing to load (`idle`). The phases alternate, on the same servers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.micro.errors import BenchmarkError
from benchmarks.micro.report import Ratio, Report
from benchmarks.policies import PolicySwitch
from benchmarks.testbed import (
    Cluster,
    ClusterSpec,
    NetworkSpec,
    StoreSpec,
    difference,
    dualpath_pair,
    greedy_payload,
    metric_sum,
    speed_model,
)
from benchmarks.testbed.metrics import Metrics
from benchmarks.testbed.store import REPOSITORY

PHASES = ("idle", "prefill", "split")
_SEED = 7
_VOCABULARY = (32, 250)  # bytes of the model's tokenizer, without its special tokens
_FIRST_TOKEN_S = 60.0
_READ_BYTES = "sglang_dualpath_read_bytes_total"


@dataclass(frozen=True)
class DecodeSettings:
    """`prompts` of `prompt_tokens` are loaded at once in each phase; an idle phase lasts `idle_s`."""

    prompts: int = 3
    prompt_tokens: int = 6016
    stream_tokens: int = 6000
    repetitions: int = 5
    idle_s: float = 6.0
    snic_mbit: int = 200
    cnic_mbit: int = 1600
    loopback: bool = False


class Stream:
    """A long answer in a thread of its own, with the time at which each token came."""

    def __init__(self, base_url: str, input_ids: Sequence[int], max_new_tokens: int) -> None:
        self.token_times_s: list[float] = []  # time.monotonic()
        self.fault: Exception | None = None
        self.finished = False
        self._first = threading.Event()
        self._stop = threading.Event()
        payload = {**greedy_payload(input_ids, max_new_tokens), "stream": True}
        self._thread = threading.Thread(target=self._run, args=(base_url, payload), daemon=True)
        self._thread.start()
        self._first.wait(_FIRST_TOKEN_S)
        if not self.token_times_s:
            self.end()
            raise BenchmarkError(f"The stream gave no token within {_FIRST_TOKEN_S:.0f} s: {self.fault}")

    def _run(self, base_url: str, payload: dict[str, object]) -> None:
        try:
            with (
                httpx.Client(base_url=base_url, timeout=_FIRST_TOKEN_S, trust_env=False) as http,
                http.stream("POST", "/generate", json=payload) as answer,
            ):
                answer.raise_for_status()
                self.note_events(answer.iter_lines())
            self.finished = not self._stop.is_set()
        except (httpx.HTTPError, BenchmarkError) as fault:
            self.fault = fault
        finally:
            self._first.set()

    def note_events(self, lines: Iterator[str]) -> None:
        """Take the time of every token of a server-sent event stream; tokens that come together share one."""
        seen = 0
        for line in lines:
            if self._stop.is_set():
                return
            text = line.removeprefix("data:").strip()
            if not line.startswith("data:") or text == "[DONE]":
                continue
            event = json.loads(text)
            if "error" in event:
                raise BenchmarkError(f"The stream failed: {event['error']}")
            now_s = time.monotonic()
            tokens = len(event.get("output_ids") or ())
            self.token_times_s += [now_s] * (tokens - seen)
            seen = max(seen, tokens)
            if seen:
                self._first.set()

    def end(self) -> None:
        """Close the connection, on which the servers abort the request."""
        self._stop.set()
        self._thread.join(_FIRST_TOKEN_S)


@dataclass(frozen=True)
class Phase:
    """What one phase showed. `read_bytes` by role come from the servers' own counters."""

    name: str
    seconds: float
    tokens: int
    gaps_s: tuple[float, ...]
    read_bytes: dict[str, float]

    @property
    def tpot_s(self) -> float:
        return self.seconds / self.tokens


def gaps_between(times_s: Sequence[float], start_s: float, end_s: float) -> tuple[int, float, tuple[float, ...]]:
    """Tokens after the first one in a window, the seconds from that first to the last, and the gaps between them.

    Raises BenchmarkError with fewer than two tokens.
    """
    inside = [moment for moment in times_s if start_s <= moment <= end_s]
    if len(inside) < 2:
        raise BenchmarkError(f"{len(inside)} token(s) came in a phase of {end_s - start_s:.1f} s: nothing to measure.")
    gaps = tuple(later - earlier for earlier, later in itertools.pairwise(inside))
    return len(inside) - 1, inside[-1] - inside[0], gaps


class _Run:
    def __init__(self, cluster: Cluster, switch: PolicySwitch, settings: DecodeSettings) -> None:
        self._cluster = cluster
        self._switch = switch
        self._settings = settings
        chooser = random.Random(_SEED)
        self.prompts = [
            [chooser.randrange(*_VOCABULARY) for _ in range(settings.prompt_tokens)] for _ in range(settings.prompts)
        ]
        self._chooser = chooser

    def load(self) -> None:
        """Send all prompts at once and wait for one token of each."""

        def ask(prompt: list[int]) -> None:
            self._cluster.generate(input_ids=prompt, max_new_tokens=1)

        with ThreadPoolExecutor(len(self.prompts)) as pool:
            list(pool.map(ask, self.prompts))

    def phase(self, name: str) -> Phase:
        """Drop all caches, start the stream, and measure it while the prompts are loaded."""
        self._switch.use("prefill" if name == "idle" else name)
        self._cluster.flush()
        before = {role: self._cluster.metrics(role) for role in ("prefill", "decode")}
        fresh = [self._chooser.randrange(*_VOCABULARY) for _ in range(256)]  # nothing of the stream's own is loaded
        stream = Stream(self._cluster.clients["router"].base_url, fresh, self._settings.stream_tokens)
        try:
            start_s = time.monotonic()
            if name == "idle":
                time.sleep(self._settings.idle_s)
            else:
                self.load()
            end_s = time.monotonic()
        finally:
            stream.end()
        if stream.finished:
            raise BenchmarkError("The stream ended before the prompts were loaded: raise --stream-tokens.")
        if stream.fault is not None:
            raise BenchmarkError(f"The stream broke off: {stream.fault}")
        read = {role: _read_bytes(self._cluster.metrics(role), before[role]) for role in before}
        tokens, seconds, gaps = gaps_between(stream.token_times_s, start_s, end_s)
        return Phase(name, seconds, tokens, gaps, read)


def _read_bytes(after: Metrics, before: Metrics) -> float:
    return metric_sum(difference(after, before), _READ_BYTES)


@contextlib.contextmanager
def _cluster(settings: DecodeSettings, say: Callable[[str], None]) -> Iterator[tuple[Cluster, PolicySwitch]]:
    out = REPOSITORY / "out"
    network = None if settings.loopback else NetworkSpec(settings.snic_mbit * 10**6, settings.cnic_mbit * 10**6)
    with tempfile.TemporaryDirectory(prefix="dualpath-decode-") as directory:
        switch = PolicySwitch(Path(directory) / "policy")
        pair = dualpath_pair(extra_flags=switch.flags, extra_env=switch.environment, max_total_tokens=32_000)
        spec = ClusterSpec(
            model=speed_model(out / "models"), servers=pair, store=StoreSpec(capacity_bytes=1 << 30), network=network
        )
        with Cluster(spec, log_dir=out / "logs" / "micro-decode", say=say) as cluster:
            yield cluster, switch


def run(settings: DecodeSettings, say: Callable[[str], None] = lambda line: None) -> Report:
    """TPOT of the stream by phase. Raises BenchmarkError when a phase was not what its name says."""
    phases: list[Phase] = []
    with _cluster(settings, say) as (cluster, switch):
        measured = _Run(cluster, switch, settings)
        measured.load()  # computes the prompts and writes them to storage
        measured.phase("split")  # first connections, first look-ups
        for repetition in range(settings.repetitions):
            for name in PHASES if repetition % 2 == 0 else PHASES[::-1]:
                phases.append(measured.phase(name))
                say(f"{name}: {phases[-1].tokens} tokens, {phases[-1].tpot_s * 1e3:.1f} ms each")
        payload_bytes = settings.prompts * settings.prompt_tokens * cluster.kv_bytes_per_token
    return summarize(settings, phases, payload_bytes)


def summarize(settings: DecodeSettings, phases: Sequence[Phase], payload_bytes: int) -> Report:
    """The report of these phases, in which prompts of `payload_bytes` were loaded.

    Raises BenchmarkError when a phase was not what its name says.
    """
    report = Report("decode", vars(settings))
    medians = {}
    for name in PHASES:
        own = [phase for phase in phases if phase.name == name]
        _check_reads(name, own, payload_bytes)
        medians[name] = report.add("TPOT", "ms", [phase.tpot_s * 1e3 for phase in own], phase=name).median
        report.add("gap between tokens", "ms", [gap * 1e3 for phase in own for gap in phase.gaps_s], phase=name)
        report.add("length of a phase", "s", [phase.seconds for phase in own], phase=name)
        for role in ("prefill", "decode"):
            report.add(f"read by {role}", "MB", [phase.read_bytes[role] / 1e6 for phase in own], phase=name)
    report.ratios = [
        Ratio("TPOT split/prefill", {}, medians["split"] / medians["prefill"]),
        Ratio("TPOT split/idle", {}, medians["split"] / medians["idle"]),
        Ratio("TPOT prefill/idle", {}, medians["prefill"] / medians["idle"]),
    ]
    return report


def _check_reads(name: str, phases: Sequence[Phase], payload_bytes: int) -> None:
    for phase in phases:
        prefill, decode = phase.read_bytes["prefill"], phase.read_bytes["decode"]
        as_named = {
            "idle": prefill + decode == 0,
            "prefill": decode == 0 and prefill > 0.9 * payload_bytes,
            "split": decode > 0 and prefill + decode > 0.9 * payload_bytes,
        }[name]
        if not as_named:
            raise BenchmarkError(
                f"A phase called {name} read {prefill / 1e6:.0f} MB on the prefill and {decode / 1e6:.0f} MB on the "
                f"decode server, of {payload_bytes / 1e6:.0f} MB in storage; the servers' logs say why."
            )
