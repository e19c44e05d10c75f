"""What requests measured: times to first token, per token, of a whole job, and ratios with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np


class Record(msgspec.Struct, omit_defaults=True):
    """One request. Times in seconds since the replay began; token counts as the server said them.

    `cached_tokens` is what the prefill server did not compute, by the place where it was found if the server says so
    (None if not). `error` is set when the request failed or its counts were not those that were asked for.
    """

    agent: int
    round: int
    sent_s: float
    first_s: float | None = None
    second_s: float | None = None
    last_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cached_device_tokens: int | None = None
    cached_host_tokens: int | None = None
    cached_storage_tokens: int | None = None
    output_tokens: int = 0
    read_s: float | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_s is None else self.first_s - self.sent_s

    @property
    def ttst_s(self) -> float | None:
        """Time to second token: it first shows that the decode server goes on."""
        return None if self.second_s is None else self.second_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first."""
        if self.first_s is None or self.last_s is None or self.output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.output_tokens - 1)


class Latencies(msgspec.Struct):
    """Of one replay; None where no request gave a value. `jct_s`: from the beginning to the last token of the last."""

    jct_s: float
    throughput_tokens_per_s: float
    ttft_mean_s: float | None
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    ttst_p50_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    read_mean_s: float | None
    read_p50_s: float | None
    read_p99_s: float | None
    itl_mean_s: float | None = None
    """Mean time between tokens by the decode servers' own counters."""


def latencies(records: Sequence[Record]) -> Latencies:
    """Over all requests that did not fail. Throughput counts prompt and generated tokens."""
    good = [record for record in records if record.error is None]
    jct_s = max((record.last_s for record in good if record.last_s is not None), default=0.0)
    tokens = sum(record.prompt_tokens + record.output_tokens for record in good)
    ttft = [record.ttft_s for record in good if record.ttft_s is not None]
    ttst = [record.ttst_s for record in good if record.ttst_s is not None]
    tpot = [record.tpot_s for record in good if record.tpot_s is not None]
    read = [record.read_s for record in good if record.read_s is not None]
    return Latencies(
        jct_s=jct_s,
        throughput_tokens_per_s=tokens / jct_s if jct_s > 0 else 0.0,
        ttft_mean_s=_mean(ttft),
        ttft_p50_s=percentile(ttft, 50),
        ttft_p90_s=percentile(ttft, 90),
        ttft_p99_s=percentile(ttft, 99),
        ttst_p50_s=percentile(ttst, 50),
        tpot_p50_s=percentile(tpot, 50),
        tpot_p99_s=percentile(tpot, 99),
        read_mean_s=_mean(read),
        read_p50_s=percentile(read, 50),
        read_p99_s=percentile(read, 99),
    )


def percentile(values: Sequence[float], rank: float) -> float | None:
    """With linear interpolation between neighbours; None of nothing."""
    return float(np.percentile(values, rank)) if len(values) else None


def median(values: Sequence[float | None]) -> float | None:
    """Of the values that are there; None if there are none."""
    return percentile([value for value in values if value is not None], 50)


def ratio_of_medians(above: Sequence[float | None], below: Sequence[float | None]) -> float | None:
    """None when either side has no value, or the one below is 0."""
    top, bottom = median(above), median(below)
    return top / bottom if top is not None and bottom else None


def bootstrap_ratio(
    above: Sequence[float],
    below: Sequence[float],
    *,
    paired: bool = False,
    confidence: float = 0.95,
    resamples: int = 20_000,
    seed: int = 1,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of median(above) / median(below).

    With ``paired`` the values at one place belong together, as those of two systems that met the same arrivals, and are
    drawn together; otherwise either side is resampled on its own. The same values give the same interval. None with
    fewer than two values on a side: one says nothing about spread.
    """
    if paired and len(above) != len(below):
        raise ValueError(f"{len(above)} values cannot be paired with {len(below)}")
    if len(above) < 2 or len(below) < 2:
        return None
    source = np.random.default_rng(seed)
    drawn = source.integers(len(above), size=(resamples, len(above)))
    drawn_below = drawn if paired else source.integers(len(below), size=(resamples, len(below)))
    top = np.median(np.asarray(above, dtype=float)[drawn], axis=1)
    bottom = np.median(np.asarray(below, dtype=float)[drawn_below], axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(top / bottom, [tail, 100 - tail])
    return float(low), float(high)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
