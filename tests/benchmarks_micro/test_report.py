"""Summaries of samples, and the JSON that other programs read."""

from __future__ import annotations

import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.micro.report import Ratio, Report, Summary


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=40))
def test_the_median_is_the_median_and_percentiles_lie_in_order(samples: list[float]) -> None:
    found = Summary.of(samples)
    assert found.median == statistics.median(samples)
    assert found.n == len(samples)
    assert found.least <= found.median <= found.most
    assert found.median <= found.p95 + 1e-3
    assert found.p95 <= found.p99 + 1e-3
    assert found.p99 <= found.most + 1e-3


def test_percentiles_of_a_known_series() -> None:
    found = Summary.of(list(range(101)))
    assert (found.median, found.p95, found.p99, found.least, found.most) == (50, 95, 99, 0, 100)


def test_no_samples_have_no_summary() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Summary.of([])


@pytest.fixture
def report() -> Report:
    made = Report("hop", {"sizes": (1, 2)}, notes=["a note"])
    made.add("bandwidth", "GB/s", [1.0, 3.0, 2.0], message="1 MiB", path="bare")
    made.ratios = [
        Ratio("push/bare", {"message": "1 MiB"}, 0.89, 0.9),
        Ratio("push/bare", {"message": "16 MiB"}, 0.9, 0.9),
        Ratio("tcp/bare", {"message": "1 MiB"}, 2.0),
    ]
    return made


def test_the_json_has_every_figure_and_where_it_was_taken(report: Report) -> None:
    told = json.loads(json.dumps(report.as_json()))
    assert set(told) == {"benchmark", "settings", "versions", "machine", "results", "ratios", "notes"}
    assert told["results"] == [
        {
            "labels": {"message": "1 MiB", "path": "bare"},
            "quantity": "bandwidth",
            "unit": "GB/s",
            "median": 2.0,
            "p95": pytest.approx(2.9),
            "p99": pytest.approx(2.98),
            "least": 1.0,
            "most": 3.0,
            "n": 3,
        }
    ]
    assert [ratio["reached"] for ratio in told["ratios"]] == [False, True, None]
    assert {"python", "sglang-dualpath"} <= set(told["versions"])
    assert {"cores", "kernel", "load_1min"} <= set(told["machine"])


def test_the_table_names_the_target_that_was_missed(report: Report) -> None:
    console = Console(width=140, highlight=False)
    with console.capture() as shown:
        report.show(console)
    text = shown.get()
    assert "push/bare at 1 MiB: 0.890 (target 0.90: not reached)" in text
    assert "push/bare at 16 MiB: 0.900 (target 0.90: reached)" in text
    assert "a note" in text
