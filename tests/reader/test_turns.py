"""Which read the prefill engine helps next: the oldest, but those last whose decode engine ends early by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_dualpath.ledger import End, Grant, Ledger, Reserve, Share
from sglang_dualpath.reader.prefetch import Prefetch
from sglang_dualpath.reader.prefill import OWN
from sglang_dualpath.reader.prefill_read import PrefillRead
from sglang_dualpath.reader.turns import in_turn

MIB_S = float(1 << 20)


def read(decode: str | None, pages: int, *, cancelled: bool = False) -> PrefillRead:
    ledger = Ledger(first_page=0, slots=tuple(range(pages)), storage_end_page=pages, reserve=Reserve(()), chunk_pages=1)
    ledger.join(OWN, Share(End.BACK), local=True)
    if decode is not None:
        ledger.join(decode, Share(End.FRONT))
    prefetch = Prefetch(
        handle=object(),
        first_page=0,
        stored_pages=pages,
        hashes=[""] * pages,
        host_indices=torch.arange(pages),
        read_pages=lambda first, slots: len(slots),
        is_cancelled=lambda: cancelled,
    )
    return PrefillRead(None, 0, prefetch, ledger, opened_s=0.0, deadline_s=math.inf, decode=decode)


def test_the_oldest_read_comes_first() -> None:
    reads = [read("a", 10), read("b", 10), read("a", 10), read("b", 10)]
    assert in_turn(reads, {}, None, now_s=0.0) == reads


def test_with_one_decode_engine_the_oldest_read_comes_first() -> None:
    reads = [read("a", 1), read("a", 100)]
    assert in_turn(reads, {}, None, now_s=0.0) == reads


def test_an_engine_that_is_far_behind_is_helped_first() -> None:
    near_its_end, far, farther = read("a", 10), read("b", 15), read("b", 15)
    assert in_turn([near_its_end, far, farther], {}, None, now_s=0.0) == [far, farther, near_its_end]


def test_what_nobody_else_reads_keeps_its_turn() -> None:
    alone = read(None, 10)
    soon, far = read("a", 1), read("b", 100)
    assert in_turn([alone, soon, far], {}, None, now_s=0.0) == [alone, far, soon]


def test_what_nobody_else_reads_is_not_overtaken_by_younger_reads() -> None:
    near_its_end, alone, far = read("a", 10), read(None, 20), read("b", 30)
    assert in_turn([near_its_end, alone, far], {}, None, now_s=0.0) == [alone, far, near_its_end]


def test_an_engine_that_ends_soon_by_itself_is_not_helped_before_what_nobody_else_reads() -> None:
    first, soon, alone = read("a", 5), read("b", 2), read(None, 10)
    assert in_turn([first, soon, alone], {}, None, now_s=0.0) == [alone, first, soon]


def test_what_nobody_else_reads_is_work_that_help_is_needed_for() -> None:
    first, second = read("a", 20), read("b", 30)
    assert in_turn([first, second], {}, None, now_s=0.0) == [first, second]
    alone = read(None, 10)
    assert in_turn([first, second, alone], {}, None, now_s=0.0) == [second, alone, first]


def test_a_decode_engine_that_has_left_reads_nothing() -> None:
    gone, soon, far = read("c", 10), read("a", 1), read("b", 100)
    gone.ledger.leave("c", now_s=0.0)
    assert in_turn([gone, soon, far], {}, None, now_s=0.0) == [gone, far, soon]


def test_what_a_decode_engine_holds_in_memory_costs_its_nic_nothing() -> None:
    first, second = read("a", 100), read("b", 300)
    assert in_turn([first, second], {}, None, now_s=0.0) == [second, first]
    assert second.ledger.reserve_range("b", 0, 280, until_s=math.inf)
    assert in_turn([first, second], {}, None, now_s=0.0) == [first, second]


def test_a_read_of_which_all_is_claimed_is_not_the_one_to_compare_with() -> None:
    taken, near_its_end, far = read(None, 1), read("a", 10), read("b", 100)
    assert isinstance(taken.ledger.claim(OWN, max_pages=None, now_s=0.0), Grant)
    assert in_turn([taken, near_its_end, far], {}, None, now_s=0.0) == [far, near_its_end]


def test_reads_that_are_over_are_left_out() -> None:
    closed, cancelled, left = read("a", 10), read("a", 10, cancelled=True), read("a", 10)
    closed.closed = True
    assert in_turn([closed, cancelled, left], {}, None, now_s=0.0) == [left]


def test_nothing_is_begun_of_a_read_past_its_deadline() -> None:
    late, left = read("a", 10), read("a", 10)
    late.deadline_s = 5.0
    assert in_turn([late, left], {}, None, now_s=4.9) == [late, left]
    assert in_turn([late, left], {}, None, now_s=5.0) == [left]


def test_a_slow_engine_is_behind_although_it_has_no_more_left() -> None:
    reads = [read("fast", 20), read("slow", 20)]
    assert in_turn(reads, {"fast": 10 * MIB_S, "slow": MIB_S}, MIB_S, now_s=0.0) == reads[::-1]
    assert in_turn(reads, {"fast": MIB_S, "slow": MIB_S}, MIB_S, now_s=0.0) == reads


def drained_after(reads: Sequence[PrefillRead], speeds: Mapping[str, int]) -> int:
    """Turns until all is claimed, if in each a decode engine claims its speed in pages and the prefill engine one."""
    turns = 0
    while any(one.ledger.span_left[0] < one.ledger.end_page for one in reads):
        turns += 1
        rates = {engine: speed * MIB_S for engine, speed in speeds.items()}
        for one in in_turn(reads, rates, MIB_S, now_s=0.0):
            if isinstance(one.ledger.claim(OWN, max_pages=1, now_s=0.0), Grant):
                break
        for engine, speed in speeds.items():
            for _ in range(speed):
                mine = (one for one in reads if one.decode == engine)
                next((one for one in mine if isinstance(one.ledger.claim(engine, max_pages=1, now_s=0.0), Grant)), None)
    return turns


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(1, 30)), min_size=1, max_size=8),
    st.fixed_dictionaries({engine: st.integers(1, 3) for engine in "abc"}),
)
def test_all_ends_as_early_as_it_can(sizes: list[tuple[str | None, int]], speeds: dict[str, int]) -> None:
    left = {engine: sum(pages for name, pages in sizes if name == engine) for engine in speeds}
    alone = sum(pages for name, pages in sizes if name is None)
    # The earliest turn in which what the decode engines cannot have read is no more than what the prefill engine can.
    earliest = next(
        turns
        for turns in range(1, 1000)
        if alone + sum(max(0, left[engine] - speeds[engine] * turns) for engine in speeds) <= turns
    )
    reads = [read(engine, pages) for engine, pages in sizes]
    # Two turns for the ends of turns, at which one page too many was claimed for the wrong engine.
    assert drained_after(reads, speeds) <= earliest + 2
