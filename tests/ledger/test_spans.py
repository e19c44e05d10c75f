"""Sets of pages as runs, against Python's sets."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dualpath.ledger.spans import Spans

runs = st.tuples(st.integers(0, 30), st.integers(0, 30))
edits = st.lists(st.tuples(st.booleans(), runs), max_size=20)


def pages_of(spans: Spans) -> set[int]:
    return {page for first, end in spans for page in range(first, end)}


def build(changes: Iterable[tuple[bool, tuple[int, int]]]) -> tuple[Spans, set[int]]:
    spans, pages = Spans(), set()
    for adds, (first, end) in changes:
        (spans.add if adds else spans.remove)(first, end)
        (pages.update if adds else pages.difference_update)(range(first, end))
    return spans, pages


@given(edits)
def test_adding_and_removing_runs_is_adding_and_removing_their_pages(changes):
    spans, pages = build(changes)
    assert pages_of(spans) == pages
    assert len(spans) == len(pages)
    assert bool(spans) == bool(pages)


@given(edits)
def test_runs_are_sorted_and_never_touch(changes):
    spans, _ = build(changes)
    flat = [page for run in spans for page in run]
    assert all(low < high for low, high in pairwise(flat))


@given(edits, edits)
def test_set_algebra_is_that_of_the_pages_and_changes_neither_operand(left, right):
    a, a_pages = build(left)
    b, b_pages = build(right)
    assert pages_of(a.minus(b)) == a_pages - b_pages
    assert pages_of(a.plus(b)) == a_pages | b_pages
    assert pages_of(a.common(b)) == a_pages & b_pages
    assert (pages_of(a), pages_of(b)) == (a_pages, b_pages)


@given(edits, runs)
def test_within_keeps_the_pages_of_a_range(changes, bounds):
    spans, pages = build(changes)
    assert pages_of(spans.within(*bounds)) == pages & set(range(*bounds))


def test_lowest_and_highest_are_the_outer_runs():
    spans = Spans(0, 3)
    spans.add(7, 9)
    assert (spans.lowest, spans.highest) == ((0, 3), (7, 9))


def test_an_empty_set_has_no_lowest_run():
    with pytest.raises(IndexError):
        _ = Spans(4, 4).lowest


def test_spans_print_their_runs():
    spans = Spans(0, 3)
    spans.add(7, 9)
    assert repr(spans) == "Spans(0..3, 7..9)"
