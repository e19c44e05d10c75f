"""Is a result worse than an earlier one, or below a ratio? What CI asks.

Ratios are compared, not times: both systems of a ratio ran on the same machine in the same run, so a baseline from
another machine of the same settings still means something.
"""

from __future__ import annotations

from benchmarks.compare.schema import Ratios, Result
from benchmarks.compare.systems import is_dualpath

REFERENCE = "sgl_mc"
TOLERANCE = 0.03  # of a ratio, by which it may fall between runs whose own intervals are narrower than that


def regressions(result: Result, baseline: Result, *, tolerance: float = TOLERANCE) -> list[str]:
    """Sentences about every DualPath system whose throughput over `sgl_mc` is surely lower than in the baseline.

    None is good.
    Sure means: the upper end of the new interval is below the lower end of the old one by more than the tolerance.
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
    for key, old in baseline.ratios.items():
        above, _, below = key.partition("/")
        if below != REFERENCE or not is_dualpath(above) or above not in result.systems or old.throughput is None:
            continue
        new = result.ratios.get(key)
        if new is None or new.throughput is None:
            found.append(f"{key} is in the baseline and not in this run.")
            continue
        compared += 1
        low, high = _ends(old)[0], _ends(new)[1]
        if high < low * (1 - tolerance):
            found.append(
                f"{key}: throughput ratio {new.throughput:.2f} (up to {high:.2f}) is below the baseline's "
                f"{old.throughput:.2f} (from {low:.2f})."
            )
    if not compared and not found:
        found.append(f"The baseline and this run have no system in common that was compared with {REFERENCE}.")
    return found


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
