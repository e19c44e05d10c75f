"""Reading the servers' Prometheus counters."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]
Metrics = Mapping[tuple[str, Labels], float]


def parse_metrics(text: str) -> dict[tuple[str, Labels], float]:
    """Samples of a Prometheus text page, keyed by (name, labels)."""
    return {
        (sample.name, frozenset(sample.labels.items())): float(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def metric_sum(metrics: Metrics, name: str, **labels: str) -> float:
    """Sum over all samples of a name that carry the given labels; 0 when there is none."""
    wanted = set(labels.items())
    return sum(value for (sample, given), value in metrics.items() if sample == name and wanted <= given)


def difference(after: Metrics, before: Metrics) -> dict[tuple[str, Labels], float]:
    """What was added to each counter between two readings."""
    return {key: value - before.get(key, 0.0) for key, value in after.items()}
