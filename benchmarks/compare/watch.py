"""What links, cores and servers counted while requests were in flight."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.compare.sampler import Sampler, busy_share
from benchmarks.compare.schema import Samples
from benchmarks.compare.systems import is_dualpath
from benchmarks.compare.targets import Target
from benchmarks.testbed import metric_sum

_SETTLE_S = 0.5  # the last packets of the last request

Windows = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Seen:
    """Times in `samples` count from the beginning of the watch."""

    samples: Samples
    link_bytes: dict[str, int]
    counted_read_bytes: dict[str, int]
    fallbacks: dict[str, int]
    itl_mean_s: float | None

    def snic_busy(self, probed_bytes_per_s: dict[str, float], windows_s: Windows) -> dict[str, float]:
        """Share of its probed rate that each server's storage link received, by server."""
        return {name: busy_share(self.samples, f"{name}/storage/rx", windows_s, rate)
                for name, rate in probed_bytes_per_s.items()}  # fmt: skip

    def cpu_busy(self, windows_s: Windows) -> float:
        """Of all cores together, while requests were in flight."""
        return _mean_inside(self.samples, self.samples.cpu_busy, windows_s)

    def core_busy(self, windows_s: Windows) -> list[float]:
        """The same of each core."""
        return [_mean_inside(self.samples, series, windows_s) for series in self.samples.core_busy]


class Watch:
    """Watches one system from its making until `stop` or `abandon`, one of which has to be called."""

    def __init__(self, system: str, target: Target, *, sample_s: float) -> None:
        self._system = system
        self._target = target
        self._counted, self._fallbacks = self._counted_read_bytes(), self._fallbacks_so_far()
        self._token_times = self._token_times_so_far()
        self.link_bytes_before = target.link_bytes()
        self._sampler = Sampler(target.counters(), every_s=sample_s, groups=target.process_groups())
        self._sampler.start()
        self.zero = time.perf_counter()

    @property
    def now_s(self) -> float:
        """Seconds since the beginning, as in the samples."""
        return time.perf_counter() - self.zero

    def stop(self) -> Seen:
        """End the sampling a moment after the last packets."""
        time.sleep(_SETTLE_S)
        samples = self._sampler.stop(self.zero)
        after = self._target.link_bytes()
        counted = {name: value - self._counted[name] for name, value in self._counted_read_bytes().items()}
        fallbacks = self._fallbacks_so_far() - self._fallbacks
        pairs = zip(self._token_times_so_far(), self._token_times, strict=True)
        seconds, tokens = (now - then for now, then in pairs)
        return Seen(
            samples=samples,
            link_bytes=added(after, self.link_bytes_before),
            counted_read_bytes=counted,
            fallbacks=dict(fallbacks),
            itl_mean_s=seconds / tokens if tokens else None,
        )

    def abandon(self) -> None:
        """End the sampling when what was watched has failed."""
        self._sampler.stop(self.zero)

    def _counted_read_bytes(self) -> dict[str, int]:
        if not is_dualpath(self._system):
            return {}
        return {name: round(metric_sum(self._target.metrics(name), "sglang_dualpath_read_bytes_total"))
                for name in self._target.names}  # fmt: skip

    def _token_times_so_far(self) -> tuple[float, float]:
        """Sum of the times between tokens, and their number, over all decode servers."""
        metrics = [self._target.metrics(name) for name in self._target.names if name.startswith("decode")]
        what = "sglang:inter_token_latency_seconds_"
        seconds, tokens = (sum(metric_sum(one, what + part) for one in metrics) for part in ("sum", "count"))
        return seconds, tokens

    def _fallbacks_so_far(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        if is_dualpath(self._system):
            for name in self._target.names:
                for (metric, labels), value in self._target.metrics(name).items():
                    if metric == "sglang_dualpath_fallbacks_total":
                        counts[dict(labels)["reason"]] += round(value)
        return counts


def added(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """What counters of links have counted in between."""
    return {name: value - before.get(name, 0) for name, value in after.items()}


def _mean_inside(samples: Samples, busy: Sequence[float], windows_s: Windows) -> float:
    inside = [share for at, share in list(zip(samples.times_s, busy, strict=True))[1:]
              if any(begin <= at <= end for begin, end in windows_s)]  # fmt: skip
    return sum(inside) / len(inside) if inside else 0.0
