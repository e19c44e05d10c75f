"""From repetitions to a result: medians, ratios with their intervals, and whether the run counts."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence

import msgspec

from benchmarks.compare.schema import (
    SCHEMA_VERSION,
    Check,
    Ratios,
    Repetition,
    Result,
    Settings,
    Sustained,
)
from benchmarks.compare.systems import SHOWN_ONLY, is_dualpath, reads_twice
from benchmarks.compare.turn import read_time_method, storage_readers
from benchmarks.load.measures import Latencies, Record, bootstrap_ratio, median, ratio_of_medians
from benchmarks.load.workload import Workload

HIT_TOLERANCE = 0.005  # by which achieved hits may differ between systems
LEAST_FROM_PLACE = 0.995  # of the hit tokens: what was still in memory would be a job without loading
LEAST_PAYLOAD, MOST_PAYLOAD = 0.98, 1.02  # of the hit bytes, that DualPath's own counters may have counted
LEAST_LINK, MOST_LINK = 0.98, 1.06  # the same by the links, which see headers, queries and acknowledgements too

BySystem = Mapping[str, Sequence[Repetition]]


def summarise(
    settings: Settings,
    workload: Workload,
    repetitions: Sequence[Repetition],
    *,
    sustained: Mapping[str, Sustained],
    versions: Mapping[str, str],
    total_s: float,
    failure: str | None = None,
    apart: bool = False,
) -> Result:
    """The result of a run. It is invalid when a required check does not hold, or `failure` ended it early.

    `apart`: the systems are of several runs.
    """
    played: dict[str, list[Repetition]] = {}
    for repetition in repetitions:
        played.setdefault(repetition.system, []).append(repetition)
    checks = _checks(settings, workload, played) + _checks_of_trials(settings, workload, sustained)
    if failure is not None:
        checks.append(Check(False, failure))
    reasons = [check.says for check in checks if check.required and not check.holds]
    systems = [system for system in settings.systems if system in played or system in sustained]
    return Result(
        schema_version=SCHEMA_VERSION,
        valid=not reasons,
        reasons=reasons,
        settings=settings,
        versions=dict(versions),
        read_time_method=read_time_method(settings),
        systems=systems,
        ratios={f"{above}/{below}": _ratios(played[above], played[below], apart=apart)
                for above, below in itertools.permutations(played, 2)},
        measured={system: _medians([repetition.measured for repetition in group])
                  for system, group in played.items()},
        snic_busy={system: _median_dict(group, lambda repetition: repetition.snic_busy)
                   for system, group in played.items()},
        link_bytes={system: {name: round(value) for name, value in
                             _median_dict(group, lambda repetition: repetition.link_bytes).items()}
                    for system, group in played.items()},
        read_amplification={system: median([_amplification(settings, repetition) for repetition in group])
                            for system, group in played.items()},
        link_read_amplification={system: median([_link_amplification(settings, repetition) for repetition in group])
                                 for system, group in played.items()},
        bytes_written={system: _rounded(median([repetition.written_bytes for repetition in group]))
                       for system, group in played.items()},
        hit_tokens={system: round(statistics.median(repetition.hit_tokens for repetition in group))
                    for system, group in played.items()},
        failed={system: sum(repetition.failed for repetition in group) for system, group in played.items()},
        cpu_busy={system: statistics.median(repetition.cpu_busy for repetition in group)
                  for system, group in played.items()},
        core_busy={system: _core_medians(group) for system, group in played.items() if not settings.deployed},
        oracle_share={system: ratio_of_medians(_throughputs(group), _throughputs(played.get("oracle", [])))
                      for system, group in played.items()},
        throughput_limit_tokens_per_s={system: _limit(settings, system, group) for system, group in played.items()},
        sustained=dict(sustained),
        probe_bytes_per_s=_median_dict(repetitions, lambda repetition: repetition.probe_bytes_per_s),
        checks=checks,
        repetitions=list(repetitions),
        total_s=total_s,
        failure=failure,
        measured_apart=apart,
    )  # fmt: skip


def _checks(settings: Settings, workload: Workload, played: BySystem) -> list[Check]:
    checks = []
    expected = settings.passes * workload.total_hit_tokens(settings.page_tokens)
    for system, group in played.items():
        required = system not in SHOWN_ONLY
        failed = sum(repetition.failed for repetition in group)
        errors = [record.error for repetition in group for record in repetition.records if record.error is not None]
        first = f" (first: {errors[0]})" if errors else ""
        checks.append(Check(failed == 0, f"{system}: {failed} requests failed{first}", required))
        lost = min(repetition.hit_tokens for repetition in group) / max(1, expected)
        checks.append(
            Check(lost >= 1 - HIT_TOLERANCE, f"{system}: at least {lost:.4f} of the expected hit tokens were hits",
                  required and not settings.low_reuse)
        )  # fmt: skip
        records = [record for repetition in group for record in repetition.records]
        checks += _check_of_places(system, records, required=required and not settings.low_reuse)
    compared = {system: [repetition.hit_tokens for repetition in group]
                for system, group in played.items() if system not in SHOWN_ONLY}  # fmt: skip
    if len(compared) > 1:
        hits = [value for values in compared.values() for value in values]
        apart = (max(hits) - min(hits)) / max(1, max(hits))
        checks.append(Check(apart <= HIT_TOLERANCE, f"hit tokens of all systems and repetitions are within {apart:.4f} "
                            f"of each other (at most {HIT_TOLERANCE})"))  # fmt: skip
    for system, group in played.items():
        for says, value, low, high in _byte_shares(settings, system, group):
            # Fewer bytes than hits: something was not loaded, and the work not that of the others. More is a finding.
            required = settings.preset == "smoke" or (value < low and settings.namespaces and not settings.low_reuse)
            checks.append(Check(low <= value <= high, f"{system}: {says} {value:.3f} times the hit bytes "
                                f"({low} to {high})", required))  # fmt: skip
    return checks


def _check_of_places(system: str, records: Sequence[Record], *, required: bool) -> list[Check]:
    """Whether hits came from storage, the oracle's from device memory, where servers say it."""
    place = "device memory" if system == "oracle" else "storage"
    told = []
    for record in records:
        tokens = record.cached_device_tokens if system == "oracle" else record.cached_storage_tokens
        if tokens is not None:
            told.append((tokens, record.cached_tokens))
    if not told:
        return []
    share = sum(tokens for tokens, _ in told) / max(1, sum(cached for _, cached in told))
    return [Check(share >= LEAST_FROM_PLACE, f"{system}: {share:.4f} of the hit tokens came from {place}", required)]


def _checks_of_trials(settings: Settings, workload: Workload, sustained: Mapping[str, Sustained]) -> list[Check]:
    """Of the search for a sustained rate: no request failed at a rate that held, and hits were hits in all trials."""
    checks = []
    for system, found in sustained.items():
        failed = sum(record.error is not None for trial in found.trials if trial.sustained for record in trial.records)
        checks.append(Check(failed == 0, f"{system}: {failed} requests failed at rates that are called sustained"))
        good = [record for trial in found.trials for record in trial.records if record.error is None]
        expected = sum(workload.hit_tokens(record.agent, record.round, settings.page_tokens) for record in good)
        hits = sum(record.cached_tokens for record in good) / max(1, expected)
        checks.append(Check(hits >= 1 - HIT_TOLERANCE, f"{system}: {hits:.4f} of the expected hit tokens were hits"))
        if settings.rounds == 1:  # later rounds find what was loaded for the one before
            checks += _check_of_places(system, good, required=True)
    return checks


def _byte_shares(
    settings: Settings, system: str, group: Sequence[Repetition]
) -> list[tuple[str, float, float, float]]:
    if system == "oracle" or system in SHOWN_ONLY:
        return []
    shares = []
    counted = median([_amplification(settings, repetition) for repetition in group])
    if is_dualpath(system) and counted is not None:
        shares.append(("servers counted reads of", counted, LEAST_PAYLOAD, MOST_PAYLOAD))
    carried = median([_link_amplification(settings, repetition) for repetition in group])
    if carried is not None:
        times = 2.0 if reads_twice(system) else 1.0
        shares.append(("storage links carried", carried, LEAST_LINK, times * MOST_LINK))
    return shares


def _amplification(settings: Settings, repetition: Repetition) -> float | None:
    """Payload read per hit byte: by DualPath's counters where there are any, else by the links."""
    if not is_dualpath(repetition.system):
        return _link_amplification(settings, repetition)
    return _per_hit_byte(settings, sum(repetition.counted_read_bytes.values()), repetition)


def _link_amplification(settings: Settings, repetition: Repetition) -> float | None:
    return None if repetition.read_bytes is None else _per_hit_byte(settings, repetition.read_bytes, repetition)


def _per_hit_byte(settings: Settings, count: int, repetition: Repetition) -> float | None:
    hit_bytes = repetition.hit_tokens * settings.kv_bytes_per_token
    return count / hit_bytes if hit_bytes else None


def _ratios(above: Sequence[Repetition], below: Sequence[Repetition], *, apart: bool) -> Ratios:
    def ratio(value: Callable[[Latencies], float | None]) -> float | None:
        return ratio_of_medians([value(one.measured) for one in above], [value(one.measured) for one in below])

    read = [[one.measured.read_mean_s for one in side if one.measured.read_mean_s is not None]
            for side in (above, below)]  # fmt: skip
    # Repetitions with one number met the same arrivals and, side by side in one run, the machine in the same minutes.
    paired = not apart and [one.number for one in above] == [one.number for one in below]
    return Ratios(
        throughput=ratio(lambda one: one.throughput_tokens_per_s),
        throughput_ci=_ci(_throughputs(above), _throughputs(below), paired=paired),
        jct=ratio(lambda one: one.jct_s),
        read_p50=ratio(lambda one: one.read_p50_s),
        read_mean=ratio(lambda one: one.read_mean_s),
        read_mean_ci=_ci(read[0], read[1], paired=paired and len(above) == len(read[0]) == len(read[1])),
        ttft_p50=ratio(lambda one: one.ttft_p50_s),
        ttft_p99=ratio(lambda one: one.ttft_p99_s),
        tpot_p50=ratio(lambda one: one.tpot_p50_s),
        itl_mean=ratio(lambda one: one.itl_mean_s),
    )


def _ci(above: Sequence[float], below: Sequence[float], *, paired: bool) -> tuple[float, float] | None:
    """None where something would be divided by 0, as when all requests of a repetition have failed."""
    return bootstrap_ratio(above, below, paired=paired) if all(below) else None


def _throughputs(group: Sequence[Repetition]) -> list[float]:
    return [repetition.measured.throughput_tokens_per_s for repetition in group]


def _limit(settings: Settings, system: str, group: Sequence[Repetition]) -> float | None:
    """Tokens per second, when all that is read comes at the probed rate of every link the system can use at once."""
    readers = storage_readers(system, settings)
    limits = []
    for repetition in group:
        rate = sum(repetition.probe_bytes_per_s.get(name, 0.0) for name in readers)
        tokens = sum(record.prompt_tokens + record.output_tokens for record in repetition.records)
        hit_bytes = repetition.hit_tokens * settings.kv_bytes_per_token
        if settings.snic_mbit is None or not rate or not hit_bytes:
            return None
        limits.append(tokens * rate / hit_bytes)
    return median(limits)


def _medians(group: Sequence[Latencies]) -> Latencies:
    values = {name: median([getattr(one, name) for one in group]) for name in Latencies.__struct_fields__}
    return Latencies(**values)  # type: ignore[arg-type]


def _median_dict(
    group: Sequence[Repetition], of: Callable[[Repetition], Mapping[str, float]]
) -> dict[str, float]:  # fmt: skip
    names = sorted({name for repetition in group for name in of(repetition)})
    found = {name: median([of(repetition).get(name) for repetition in group]) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _core_medians(group: Sequence[Repetition]) -> list[float]:
    return [statistics.median(shares) for shares in zip(*(one.core_busy for one in group), strict=False)]


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


def merge(results: Sequence[Result], workload: Workload) -> Result:
    """Results of the same settings, each of other systems, as one: for systems that cannot run side by side.

    Raises ValueError when they do not fit together.
    """
    first = results[0]
    systems: list[str] = []
    for result in results:
        mine, theirs = first.settings.work(), result.settings.work()
        if mine != theirs:
            raise ValueError(f"The runs differ in {', '.join(name for name in mine if mine[name] != theirs[name])}.")
        systems += [system for system in result.systems if system not in systems]
    return summarise(
        msgspec.structs.replace(first.settings, systems=tuple(systems)), workload,
        [repetition for result in results for repetition in result.repetitions],
        sustained={name: found for result in results for name, found in result.sustained.items()},
        versions=first.versions | {
            f"{name} of {', '.join(result.systems)}": value for result in results[1:]
            for name, value in result.versions.items() if value != first.versions.get(name)
        },
        total_s=sum(result.total_s for result in results),
        failure=" ".join(result.failure for result in results if result.failure) or None,
        apart=len(results) > 1 or first.measured_apart,
    )  # fmt: skip
