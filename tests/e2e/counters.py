"""What the servers' own counters say happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.testbed.cluster import Cluster

PREFIX = "sglang_dualpath_"


@dataclass(frozen=True)
class Counters:
    """Sums over both servers by metric and label values, without the prefix."""

    values: Mapping[tuple[str, str, tuple[str, ...]], float]

    def total(self, name: str, *labels: str, server: str | None = None) -> float:
        """Sum of all samples of ``name`` that have all of ``labels`` among their label values."""
        return sum(
            value
            for (owner, metric, held), value in self.values.items()
            if metric == name and set(labels) <= set(held) and server in (None, owner)
        )

    def since(self, before: Counters) -> Counters:
        return Counters({key: value - before.values.get(key, 0.0) for key, value in self.values.items()})


def count(cluster: Cluster) -> Counters:
    """The counters now."""
    values = {}
    for server in cluster.names:
        for (name, labels), value in cluster.metrics(server).items():
            if name.startswith(PREFIX) and not name.endswith("_created"):
                held = tuple(sorted(text for label, text in labels if label != "pid"))
                key = (server, name.removeprefix(PREFIX), held)
                values[key] = values.get(key, 0.0) + value
    return Counters(values)
