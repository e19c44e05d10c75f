"""Spare slots: promised, swapped, quarantined, released; never more, never fewer."""

from __future__ import annotations

import pytest

from sglang_dualpath.ledger import Reserve


@pytest.fixture
def four() -> Reserve:
    return Reserve([10, 11, 12, 13])


def spares(reserve: Reserve) -> tuple[int, ...]:
    """Takes all free spares of `reserve`, the one to be used first in front."""
    slots = range(1000, 1000 + reserve.free)
    assert reserve.back(len(slots))
    return reserve.swap(slots, "taker")


def test_a_new_reserve_is_free(four):
    assert (four.size, four.free, four.spares, four.backing, four.quarantined) == (4, 4, 4, 0, 0)


def test_a_slot_named_twice_is_no_reserve():
    with pytest.raises(ValueError, match="distinct"):
        Reserve([1, 1])


def test_backing_takes_from_what_is_free(four):
    assert four.back(3)
    assert (four.free, four.backing) == (1, 3)


def test_backing_more_than_is_free_promises_nothing(four):
    four.back(3)
    assert not four.back(2)
    assert four.backing == 3


def test_a_negative_number_of_pages_cannot_be_backed(four):
    with pytest.raises(ValueError, match="cannot back"):
        four.back(-1)


def test_unbacking_frees(four):
    four.back(3)
    four.unback(2)
    assert (four.free, four.backing) == (3, 1)


@pytest.mark.parametrize("pages", [-1, 2])
def test_only_what_is_backed_can_be_unbacked(four, pages):
    four.back(1)
    with pytest.raises(ValueError, match="cannot unback"):
        four.unback(pages)


def test_a_swap_gives_spares_and_quarantines_the_old_slots(four):
    four.back(2)
    assert four.swap([0, 1], "writer") == (10, 11)
    assert four.exposed_slots() == {0, 1}
    assert (four.free, four.backing, four.quarantined) == (2, 0, 2)


def test_a_swap_without_backing_is_refused_and_changes_nothing(four):
    four.back(1)
    with pytest.raises(ValueError, match="only 1 backed"):
        four.swap([0, 1], "writer")
    assert (four.free, four.backing, four.quarantined) == (3, 1, 0)


def test_two_writers_cannot_share_a_key(four):
    four.back(2)
    four.swap([0], "writer")
    with pytest.raises(ValueError, match="in use"):
        four.swap([1], "writer")
    assert (four.backing, four.exposed_slots()) == (1, {0})


def test_swapping_nothing_quarantines_nothing(four):
    assert four.swap([], "writer") == ()
    assert (four.spares, four.quarantined) == (4, 0)


def test_the_last_word_of_a_writer_turns_its_slots_into_spares(four):
    four.back(2)
    four.swap([0, 1], "writer")
    assert four.release("writer") == 2
    assert (four.quarantined, spares(four)) == (0, (12, 13, 0, 1))


def test_a_last_word_that_comes_twice_releases_once(four):
    four.back(1)
    four.swap([0], "writer")
    assert (four.release("writer"), four.release("writer")) == (1, 0)
    assert four.spares == four.size


def test_one_writers_word_leaves_the_others_in_quarantine(four):
    four.back(2)
    four.swap([0], "a")
    four.swap([1], "b")
    four.release("a")
    assert four.exposed_slots() == {1}


def test_reseating_after_a_flush_replaces_the_spares_and_keeps_the_quarantine(four):
    four.back(1)
    four.swap([0], "writer")
    four.reseat([20, 21, 22])
    assert four.exposed_slots() == {0}
    assert spares(four) == (20, 21, 22)


@pytest.mark.parametrize("slots", [[20, 21], [20, 21, 22, 23], [20, 20, 21], [0, 20, 21]])
def test_reseating_refuses_another_size_and_slots_that_are_taken(four, slots):
    four.back(1)
    four.swap([0], "writer")
    with pytest.raises(ValueError, match=r"distinct slots|quarantined slot"):
        four.reseat(slots)
    assert spares(four) == (11, 12, 13)
