"""The ledger's and the control sockets' microbenchmarks at tiny sizes."""

from __future__ import annotations

import pytest

from benchmarks.micro.control import ControlSettings
from benchmarks.micro.control import run as run_control
from benchmarks.micro.ledger import LedgerSettings, drain
from benchmarks.micro.ledger import run as run_ledger


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("held", [0, 10, 40])
def test_a_drain_counts_a_claim_and_a_landing_for_every_chunk_at_least(chunk: int, held: int) -> None:
    operations, seconds = drain(40, chunk, held_pages=held)
    assert operations >= 2 * -(-40 // chunk)
    assert operations <= 3 * 40 + 10  # a claim, its landing, and at most one refusal of the other end meanwhile
    assert seconds > 0


def test_the_ledger_is_measured_with_and_without_memory() -> None:
    report = run_ledger(LedgerSettings(pages=20, chunks=(2,), repetitions=3))
    assert [(row.labels["chunk_pages"], row.labels["held_pages"]) for row in report.rows] == [(2, 0), (2, 10)]
    assert all(row.summary.n == 3 and row.summary.least > 0 for row in report.rows)


def test_every_round_trip_is_a_sample() -> None:
    report = run_control(ControlSettings(round_trips=12, warm_up=2, rounds=3))
    assert [row.labels["key"] for row in report.rows] == ["without key", "with key"]
    assert all(row.summary.n == 12 and row.summary.least > 0 for row in report.rows)
