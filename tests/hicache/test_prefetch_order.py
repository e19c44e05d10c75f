"""In which order a decode engine prefetches and claims: that of the offers, which its prefill engine reads in, too."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sglang_dualpath.reader.decode import Standing
from tests.clock import Clock
from tests.hicache.decode_side import DecodeNode

A_WHILE_S = 1.0  # longer than one that was refused waits until it is asked for again: 50 ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def node(clock: Clock) -> DecodeNode:
    """Three requests were accepted; two prefetches are all that it may have at once."""
    return with_requests(DecodeNode(), clock)


def with_requests(node: DecodeNode, clock: Clock) -> DecodeNode:
    node.tree.most_at_once = 2
    node.reads.clock = clock
    for room in (1, 2, 3):
        node.accept(room, str(room), pages=4)
    return node


def started(node: DecodeNode) -> list[str]:
    return list(node.tree.ongoing)


def end(node: DecodeNode, name: str) -> None:
    """SGLang has room for another prefetch. What became of this one does not matter here."""
    del node.tree.ongoing[name]


def test_prefetches_start_in_the_order_of_the_offers(node: DecodeNode) -> None:
    for room in (3, 1, 2):
        node.make_offer(room, pages=4)
    node.path.tick()
    assert started(node) == ["3", "1"]


def test_one_that_has_to_wait_lets_no_younger_one_pass(node: DecodeNode, clock: Clock) -> None:
    node.tree.most_at_once = 1
    for room in (3, 2):
        node.make_offer(room, pages=4)
    node.path.tick()
    assert started(node) == ["3"]
    clock.now_s += 0.03
    node.make_offer(1, pages=4)
    node.path.tick()
    clock.now_s += 0.03
    node.path.tick()  # the second is refused again
    clock.now_s += 0.03
    end(node, "3")
    node.path.tick()
    assert started(node) == [], "the youngest was asked for before its turn"
    clock.now_s += A_WHILE_S
    node.path.tick()
    assert started(node) == ["2"]
    end(node, "2")
    clock.now_s += A_WHILE_S
    node.path.tick()
    assert started(node) == ["1"]


def test_one_that_leaves_while_it_waits_holds_nobody_up(node: DecodeNode) -> None:
    node.tree.most_at_once = 1
    for room in (3, 2, 1):
        node.make_offer(room, pages=4)
        node.path.tick()
    end(node, "3")
    node.leave(2, "2")
    node.path.tick()
    assert started(node) == ["1"]


def test_one_for_which_host_memory_is_too_small_now_lets_no_younger_one_pass(node: DecodeNode, clock: Clock) -> None:
    for room in (3, 2):
        node.make_offer(room, pages=4)
    node.path.tick()
    end(node, "3")
    node.path.revoked("3")
    node.make_offer(1, pages=4)
    node.path.tick()
    assert started(node) == ["2"]
    clock.now_s += A_WHILE_S
    node.path.tick()
    assert started(node) == ["2", "3"]


def test_one_waits_for_all_of_its_host_pages_while_another_may_give_some_back(node: DecodeNode) -> None:
    node.make_offer(1, pages=4)
    node.path.tick()
    assert not node.path.waits_for_room(), "nobody else gives anything back"
    node.make_offer(2, pages=4)
    node.path.tick()
    assert node.path.waits_for_room()
    end(node, "1")
    assert not node.path.waits_for_room()


class Other:
    """The other rank, which got all offers at once."""

    rank, size = 0, 2

    def least(self, values: Sequence[int]) -> list[int]:
        width = len(Standing._fields)
        return [0 if place % width == Standing._fields.index("order") else value for place, value in enumerate(values)]

    def of_first(self, values: Sequence[int]) -> list[int]:
        return list(values)


def test_ranks_that_got_the_offers_in_other_orders_start_them_in_the_same(clock: Clock) -> None:
    for offers in ((3, 1, 2), (1, 2, 3)):
        node = with_requests(DecodeNode(ranks=Other()), clock)
        for room in offers:
            node.make_offer(room, pages=4)
        node.path.tick()
        assert started(node) == ["1", "2"]


def test_what_was_opened_first_is_claimed_first(node: DecodeNode) -> None:
    for room in (3, 1):
        node.make_offer(room, pages=4)
    node.path.tick()
    for name in started(node):
        node.path.allocated(node.tree.ongoing[name])
    rooms = [claim.room for claim in node.claims]
    assert set(rooms) == {3}
    node.bring(3, 0, 1)
    assert [claim.room for claim in node.claims] == [*rooms, 3], "the first was not accepted first, and has pages left"
