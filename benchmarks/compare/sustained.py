"""The largest rate of arriving agents at which enough requests keep the objective on TTFT and TPOT, by bisection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.compare.schema import Slo, Sustained, Trial
from benchmarks.load.measures import Record, latencies


def search(play_at: Callable[[float, int], Trial], *, highest_per_s: float, steps: int) -> Sustained:
    """Halves the range from 0 to `highest_per_s` `steps` times, assuming that a higher rate never helps.

    `play_at(rate, trial)` plays all agents arriving at a rate per second. The answer is the largest rate that was seen
    to hold (0 if none did), so it is below the true one by at most highest_per_s / 2**steps, unless every trial held:
    then the true one may be any higher.
    """
    low, high = 0.0, highest_per_s
    trials = []
    for number in range(steps):
        rate = (low + high) / 2
        trials.append(play_at(rate, number))
        low, high = (rate, high) if trials[-1].sustained else (low, rate)
    return Sustained(low, trials)


def judged(agents_per_s: float, records: Sequence[Record], slo: Slo) -> Trial:
    """A trial of these requests, which holds when enough of them kept the objective."""
    share = share_within(records, slo)
    return Trial(agents_per_s, share, share >= slo.share, latencies(records), list(records))


def can_hold(records: Sequence[Record], requests: int, slo: Slo) -> bool:
    """Whether a trial of so many requests, of which these have been played, might still hold."""
    return (_kept(records, slo) + requests - len(records)) / requests >= slo.share


def share_within(records: Sequence[Record], slo: Slo) -> float:
    """Share of requests that kept both; a failed request kept neither. 0 of no requests."""
    return _kept(records, slo) / len(records) if records else 0.0


def _kept(records: Sequence[Record], slo: Slo) -> int:
    return sum(
        record.error is None
        and record.ttft_s is not None
        and record.ttft_s <= slo.ttft_s
        and (record.tpot_s is None or record.tpot_s <= slo.tpot_s)
        for record in records
    )
