"""Is a result worse than an earlier one, or below a ratio? What CI asks.

Ratios are compared, not times: both systems of a ratio ran on the same machine in the same run, so a baseline from
another machine of the same settings still means something.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.compare.schema import Ratios, Result, Sustained
from benchmarks.compare.systems import is_dualpath

REFERENCE = "sgl_mc"
READ_REFERENCES = (REFERENCE, "dualpath:shorter_queue")
TOLERANCE = 0.03  # of a ratio, by which it may fall between runs whose own intervals are narrower than that
MOST_PAYLOAD = 1.02  # bytes read per hit byte that no baseline makes a regression


class _Figure(NamedTuple):
    """A ratio of two systems, and between what it surely lies."""

    value: float
    low: float
    high: float
    higher_is_better: bool


def regressions(result: Result, baseline: Result, *, tolerance: float = TOLERANCE) -> list[str]:
    """Sentences about every DualPath system that is surely worse than in the baseline. None is good.

    What is compared: throughput over `sgl_mc` of jobs; mean read time over `sgl_mc`'s or `shorter_queue`'s where
    requests are alone or arrive by themselves; sustained rate over `sgl_mc`'s; and bytes read per hit byte. Surely
    means: the better end of the new interval is worse than the worse end of the old one by more than the tolerance.
    With one repetition there is no interval, and the values themselves are compared.
    """
    if not result.valid:
        return [f"The run itself is invalid: {'; '.join(result.reasons)}."]
    if not baseline.valid:
        return [f"The baseline is an invalid run: {'; '.join(baseline.reasons)}."]
    mine, theirs = result.settings.work(), baseline.settings.work()
    different = [name for name in mine if mine[name] != theirs[name]]
    if result.versions.get("model") != baseline.versions.get("model"):
        different.append("model")
    if different:
        return [f"The baseline was measured with other settings ({', '.join(different)}): measure it anew."]
    found = []
    compared = 0
    now = dict(_figures(result))
    for name, old in _figures(baseline):
        if name.partition("/")[0] not in result.systems:
            continue
        if name not in now:
            found.append(f"{name} is in the baseline and not in this run.")
            continue
        compared += 1
        new = now[name]
        if new.higher_is_better and new.high < old.low * (1 - tolerance):
            found.append(
                f"{name} ratio {new.value:.2f} (up to {new.high:.2f}) is below the baseline's {old.value:.2f} (from "
                f"{old.low:.2f})."
            )
        elif not new.higher_is_better and new.low > old.high * (1 + tolerance):
            found.append(
                f"{name} ratio {new.value:.2f} (at least {new.low:.2f}) is above the baseline's {old.value:.2f} (up to "
                f"{old.high:.2f})."
            )
    if not compared and not found:
        found.append(f"The baseline and this run have no system in common that was compared with {REFERENCE}.")
    return found + list(_more_read(result, baseline, tolerance))


def _figures(result: Result) -> Iterator[tuple[str, _Figure]]:
    """What is compared of a result, by "ABOVE/BELOW: what"."""
    one_at_a_time = result.settings.mode == "poisson" or result.settings.in_flight == 1
    for key, ratios in result.ratios.items():
        above, _, below = key.partition("/")
        if not is_dualpath(above):
            continue
        if result.settings.mode == "offline" and below == REFERENCE and ratios.throughput is not None:
            yield f"{key}: throughput", _Figure(ratios.throughput, *_ends(ratios), True)
        if one_at_a_time and below in READ_REFERENCES and ratios.read_mean is not None:
            ends = ratios.read_mean_ci or (ratios.read_mean, ratios.read_mean)
            yield f"{key}: mean read time", _Figure(ratios.read_mean, *ends, False)
    reference = result.sustained.get(REFERENCE)
    for system, found in result.sustained.items():
        if is_dualpath(system) and reference is not None and reference.agents_per_s:
            value = found.agents_per_s / reference.agents_per_s
            low = found.agents_per_s / _next_rate(reference)
            high = _next_rate(found) / reference.agents_per_s
            yield f"{system}/{REFERENCE}: sustained rate", _Figure(value, low, high, True)


def _next_rate(found: Sustained) -> float:
    """The lowest rate that did not hold, which the true one is below; infinity if all did."""
    return min((trial.agents_per_s for trial in found.trials if not trial.sustained), default=math.inf)


def _more_read(result: Result, baseline: Result, tolerance: float) -> Iterator[str]:
    for system, new in result.read_amplification.items():
        old = baseline.read_amplification.get(system)
        if not is_dualpath(system) or new is None or old is None:
            continue
        if new > max(MOST_PAYLOAD, old * (1 + tolerance)):
            yield f"{system} read {new:.3f} times the hit bytes, and {old:.3f} times in the baseline."


def below_ratio(result: Result, least: float) -> list[str]:
    """Sentences about DualPath's default policy (else each of its policies) if the lower end of its interval is below.

    Several policies run to be looked at; what users get without asking is `split`.
    """
    if not result.valid:
        return [f"The run itself is invalid: {'; '.join(result.reasons)}."]
    ours = [system for system in result.systems if is_dualpath(system)]
    if "dualpath:split" in ours:
        ours = ["dualpath:split"]
    found = []
    for system in ours:
        ratios = result.ratios.get(f"{system}/{REFERENCE}")
        if ratios is None or ratios.throughput is None:
            found.append(f"There is no ratio of {system} to {REFERENCE} in this run.")
        elif _ends(ratios)[0] < least:
            found.append(
                f"{system}/{REFERENCE}: throughput ratio {ratios.throughput:.2f}, surely at least "
                f"{_ends(ratios)[0]:.2f}, is below {least:g}."
            )
    return found or ([] if ours else ["No DualPath system is in this run."])


def _ends(ratios: Ratios) -> tuple[float, float]:
    if ratios.throughput_ci is not None:
        return ratios.throughput_ci
    return (ratios.throughput or 0.0, ratios.throughput or 0.0)
