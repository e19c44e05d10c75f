"""What a microbenchmark found: summaries of samples, and where they were taken; as a table or as JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

PACKAGES = (
    "sglang-dualpath",
    "sglang",
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-non-cuda",
    "nixl",
    "pyzmq",
    "msgspec",
    "torch",
)


@dataclass(frozen=True)
class Summary:
    """Samples of one quantity. Percentiles are interpolated linearly between the nearest samples."""

    median: float
    p95: float
    p99: float
    least: float
    most: float
    n: int

    @staticmethod
    def of(samples: Sequence[float]) -> Summary:
        """Raises ValueError without samples."""
        if not samples:
            raise ValueError("no samples")
        p95, p99 = (float(value) for value in np.percentile(samples, [95, 99]))
        return Summary(statistics.median(samples), p95, p99, min(samples), max(samples), len(samples))


@dataclass(frozen=True)
class Row:
    """One measured quantity: what was done (`labels`, in the order to be shown), and its samples' summary."""

    labels: Mapping[str, str | int]
    quantity: str
    unit: str
    summary: Summary


@dataclass(frozen=True)
class Ratio:
    """A quotient of two medians, with the labels it was taken at. `target` is the least it should be, if any."""

    name: str
    labels: Mapping[str, str | int]
    value: float
    target: float | None = None

    @property
    def reached(self) -> bool | None:
        return None if self.target is None else self.value >= self.target


@dataclass
class Report:
    """Everything one run of a microbenchmark says."""

    benchmark: str
    settings: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, quantity: str, unit: str, samples: Sequence[float], **labels: str | int) -> Summary:
        """Add a row; returns its summary."""
        summary = Summary.of(samples)
        self.rows.append(Row(labels, quantity, unit, summary))
        return summary

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints; keys are stable."""
        return {
            "benchmark": self.benchmark,
            "settings": dict(self.settings),
            "versions": versions(),
            "machine": machine(),
            "results": [
                {"labels": dict(row.labels), "quantity": row.quantity, "unit": row.unit, **vars(row.summary)}
                for row in self.rows
            ],
            "ratios": [
                {
                    "name": ratio.name,
                    "labels": dict(ratio.labels),
                    "value": ratio.value,
                    "target": ratio.target,
                    "reached": ratio.reached,
                }
                for ratio in self.ratios
            ],
            "notes": self.notes,
        }

    def show(self, console: Console) -> None:
        """Print tables for a person."""
        console.print(", ".join(f"{name} {_spoken(value)}" for name, value in self.settings.items()), style="dim")
        names = list(dict.fromkeys(name for row in self.rows for name in row.labels))
        table = Table(*names, "", "unit", title=self.benchmark, title_justify="left")
        for column in ("median", "p95", "p99", "least", "most", "n"):
            table.add_column(column, justify="right")
        for row in self.rows:
            figures = (row.summary.median, row.summary.p95, row.summary.p99, row.summary.least, row.summary.most)
            labels = (str(row.labels.get(name, "")) for name in names)
            table.add_row(*labels, row.quantity, row.unit, *map(_figure, figures), str(row.summary.n))
        console.print(table)
        for ratio in self.ratios:
            where = ", ".join(str(value) for value in ratio.labels.values())
            verdict = ""
            if ratio.target is not None:
                verdict = f" (target {ratio.target:.2f}: {'reached' if ratio.reached else '[red]not reached[/red]'})"
            console.print(f"{ratio.name}{f' at {where}' if where else ''}: {ratio.value:.3f}{verdict}")
        for note in self.notes:
            console.print(note)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose code is measured; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What the figures depend on besides versions; the load says whether the machine was busy with something else."""
    one, five, _ = os.getloadavg()
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "load_1min": round(one, 2),
        "load_5min": round(five, 2),
    }


def _figure(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _spoken(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
