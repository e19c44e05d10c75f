"""What a run writes to result.json. Fields are only ever added; anything else raises SCHEMA_VERSION.

Sizes in bytes, times in seconds, rates in Mbit/s (10^6 bits) only where a name says so. Links are named
"NODE/NETWORK/DIRECTION", direction as the node sees it: "prefill/storage/rx" is what the prefill node read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from benchmarks.load.measures import Latencies, Record
from benchmarks.testbed import KV_BYTES_PER_TOKEN, PAGE_TOKENS

SCHEMA_VERSION = 1


class Pools(msgspec.Struct, frozen=True):
    """Device pool in tokens and host pool as a multiple of it, of each prefill and each decode server."""

    prefill_tokens: int
    prefill_ratio: float
    decode_tokens: int
    decode_ratio: float


class Slo(msgspec.Struct, frozen=True):
    """What an online request must keep, and the share of requests that must keep it."""

    ttft_s: float = 8.0
    tpot_s: float = 0.3
    share: float = 0.9


class Settings(msgspec.Struct, frozen=True):
    """A preset after the command line was applied. `snic_mbit` and `cnic_mbit` None: links without limit."""

    preset: str
    mode: str  # "offline": agents at once; "poisson": reads at a share of the links; "online": largest sustained rate
    systems: tuple[str, ...]
    prefill_servers: int = 1
    decode_servers: int = 1
    repetitions: int = 5
    agents: int = 12
    rounds: int = 1
    passes: int = 1
    in_flight_per_prefill: int = 8
    contexts: tuple[int, int] = (6000, 7600)
    longest_tokens: int = 8000
    # Of a mean context of 6,800 tokens as much as in the DualPath paper's trace: 429 of 32,721 are new.
    appended_tokens: int = 96
    # Fewer than there (176): a server has one core to compute them.
    generated_tokens: int = 8
    load: float = 0.5
    slo: Slo = Slo()
    trial_steps: int = 5
    snic_mbit: int | None = 200
    cnic_mbit: int | None = 1600
    namespaces: bool = True
    trace: str | None = None
    low_reuse: bool = False
    pools: Pools = Pools(24_000, 5.0, 66_000, 1.82)
    sample_s: float = 0.25
    seed: int = 20260
    page_tokens: int = PAGE_TOKENS
    kv_bytes_per_token: int = KV_BYTES_PER_TOKEN
    deployed: bool = False
    """Servers that somebody had started: no links of the testbed, and other machines' cores."""

    @property
    def in_flight(self) -> int:
        return self.in_flight_per_prefill * self.prefill_servers

    @property
    def arrivals(self) -> str:
        """How requests come, in words."""
        if self.mode == "offline":
            return f"at most {self.in_flight} requests in flight"
        if self.mode == "poisson":
            return f"reads arrive at {self.load:.0%} of what all storage links carry"
        return "agents arrive at rates that are searched"

    def work(self) -> dict[str, Any]:
        """What has to be the same for two results to be compared: all but who does it, and how often."""
        return {name: getattr(self, name) for name in self.__struct_fields__ if name not in {"systems", "repetitions"}}


class Samples(msgspec.Struct):
    """Counters over time; `times_s` as in the records, which may begin before 0. `link_bytes` and `cpu_s` add up."""

    times_s: list[float] = []
    link_bytes: dict[str, list[int]] = {}
    cpu_busy: list[float] = []
    """Share of all cores that was busy since the sample before, 0 for the first."""
    core_busy: list[list[float]] = []
    """The same of each core."""
    process_cpu_s: dict[str, float] = {}
    """CPU time of each server, the store and the router over all samples."""


class Repetition(msgspec.Struct):
    """One system once: its requests, what its links carried meanwhile, and what its servers counted."""

    system: str
    number: int
    records: list[Record]
    measured: Latencies
    windows_s: list[tuple[float, float]]
    """When requests were in flight: more than one where caches were dropped between rounds."""
    samples: Samples
    link_bytes: dict[str, int]
    """While measuring, without what was written back afterwards."""
    probe_bytes_per_s: dict[str, float]
    """What a plain TCP transfer got through each node's storage link just before, by node."""
    snic_busy: dict[str, float]
    hit_tokens: int
    read_bytes: int | None
    counted_read_bytes: dict[str, int]
    """By DualPath's own counters, by server; empty for stock."""
    written_bytes: int | None
    cpu_busy: float
    base_ttft_s: float | None
    failed: int
    start_s: float
    """Time that servers and router took to come up; 0 when they were up already."""
    fallbacks: dict[str, int] = msgspec.field(default_factory=dict)
    """How often DualPath went on without something that it had counted on, by reason, all servers together."""
    core_busy: list[float] = []
    """`cpu_busy` of each core."""


class Ratios(msgspec.Struct):
    """One system divided by another, medians over repetitions. Above 1 is better for throughput, below 1 elsewhere."""

    throughput: float | None = None
    throughput_ci: tuple[float, float] | None = None
    jct: float | None = None
    read_p50: float | None = None
    read_mean: float | None = None
    read_mean_ci: tuple[float, float] | None = None
    ttft_p50: float | None = None
    ttft_p99: float | None = None
    tpot_p50: float | None = None
    itl_mean: float | None = None


class Trial(msgspec.Struct):
    """One rate of the search for the largest sustained one."""

    agents_per_s: float
    share_within: float
    sustained: bool
    measured: Latencies
    records: list[Record] = []
    snic_busy: dict[str, float] = {}
    link_bytes: dict[str, int] = {}
    cpu_busy: float | None = None
    fallbacks: dict[str, int] = {}


class Sustained(msgspec.Struct):
    """Largest rate at which enough requests kept the SLO, and the trials that bracket it."""

    agents_per_s: float
    trials: list[Trial]


class Check(msgspec.Struct):
    """Something that must hold for a run to count (`required`), or that a reader should know."""

    holds: bool
    says: str
    required: bool = True


class Result(msgspec.Struct):
    """Everything of one run; dictionaries by system hold medians over its repetitions."""

    schema_version: int
    valid: bool
    reasons: list[str]
    settings: Settings
    versions: dict[str, str]
    read_time_method: str
    systems: list[str]
    ratios: dict[str, Ratios]
    measured: dict[str, Latencies]
    snic_busy: dict[str, dict[str, float]]
    link_bytes: dict[str, dict[str, int]]
    read_amplification: dict[str, float | None]
    link_read_amplification: dict[str, float | None]
    bytes_written: dict[str, int | None]
    hit_tokens: dict[str, int]
    failed: dict[str, int]
    cpu_busy: dict[str, float]
    oracle_share: dict[str, float | None]
    throughput_limit_tokens_per_s: dict[str, float | None]
    """What the links that a system may read through would allow, if nothing else took time."""
    sustained: dict[str, Sustained]
    probe_bytes_per_s: dict[str, float]
    checks: list[Check]
    repetitions: list[Repetition]
    total_s: float = 0.0
    failure: str | None = None
    """What ended the run early."""
    core_busy: dict[str, list[float]] = {}
    """By system, of each core; empty in results of before it was noted, and where servers ran elsewhere."""
    measured_apart: bool = False
    """Systems were measured in several runs, one after the other: repetitions of one number have nothing in common."""


class ResultError(ValueError):
    """A result.json that cannot be read; the message is one sentence for the user."""


def save(result: Result, path: Path) -> None:
    """As JSON with rounded numbers, one repetition per line."""
    plain = _rounded(msgspec.to_builtins(result))
    repetitions = plain.pop("repetitions")
    head = msgspec.json.format(msgspec.json.encode(plain), indent=1).decode()
    lines = ",\n".join(msgspec.json.encode(repetition).decode() for repetition in repetitions)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[: head.rindex("}")].rstrip()},\n "repetitions": [\n{lines}\n]\n}}\n')


def load_result(path: Path) -> Result:
    """Raises ResultError when the file is missing, no result, or of another schema version."""
    try:
        content = path.read_bytes()
        version = msgspec.json.decode(content, type=_Versioned).schema_version
        if version != SCHEMA_VERSION:
            raise ResultError(f"{path} has schema version {version} and this reads {SCHEMA_VERSION}: run it again.")
        return msgspec.json.decode(content, type=Result)
    except (OSError, msgspec.MsgspecError) as error:
        raise ResultError(f"{path} is not a result of benchmarks.compare: {error}.") from error


class _Versioned(msgspec.Struct):
    schema_version: int


def _rounded(value: Any) -> Any:
    """Six significant digits are more than any of it is worth."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
