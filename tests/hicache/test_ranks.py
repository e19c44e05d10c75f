"""What one decode rank does when another one of its server knows less, or something else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sglang_dualpath.protocol import Bye, Decline
from sglang_dualpath.reader.decode import Answer, Standing
from tests.hicache.decode_side import DecodeNode, hashes
from tests.reader.host import PAGE_TOKENS

ROOM = 1
OFFERED = Standing(Answer.OFFER, end_page=8, minus_first_page=0, order=0, over=0)
OVER = Standing(Answer.NONE, end_page=0, minus_first_page=0, order=0, over=1)


class Other:
    """The other rank, which knows of each read what a test says."""

    rank, size = 0, 2

    def __init__(self, standing: Standing = OFFERED) -> None:
        self.standing = standing
        self.flag = True
        self.asked = 0

    def least(self, values: Sequence[int]) -> list[int]:
        self.asked += 1
        width = len(Standing._fields)
        theirs = [*self.standing] * (len(values) // width) if len(values) % width == 0 else [self.flag] * len(values)
        return [min(pair) for pair in zip(values, theirs, strict=True)]

    def of_first(self, values: Sequence[int]) -> list[int]:
        return list(values)


@pytest.fixture
def other() -> Other:
    return Other()


def declined(node: DecodeNode) -> list[str]:
    return [message.reason for message in node.said if isinstance(message, Decline)]


def test_without_requests_nobody_is_asked(other: Other) -> None:
    DecodeNode(ranks=other).path.tick()
    assert other.asked == 0


def test_an_offer_waits_for_that_of_the_other_rank(other: Other) -> None:
    node = DecodeNode(ranks=other)
    node.accept(ROOM)
    other.standing = OFFERED._replace(answer=Answer.LATER)
    node.make_offer(ROOM)
    node.path.tick()
    assert not node.tree.ongoing
    other.standing = OFFERED
    node.path.tick()
    (operation,) = node.tree.ongoing.values()
    assert operation.hash_value == hashes(0, 8)


def test_no_more_is_prefetched_than_the_other_rank_was_offered(other: Other) -> None:
    """Storage may have lost pages of one rank, and a prefetch of another length meets another rank's reductions."""
    other.standing = OFFERED._replace(end_page=5)
    node = DecodeNode(ranks=other)
    node.accept(ROOM)
    assert node.offer(ROOM).hash_value == hashes(0, 5)


def test_a_read_that_begins_later_on_the_other_rank_begins_there_on_this_one(other: Other) -> None:
    other.standing = OFFERED._replace(minus_first_page=-3)
    node = DecodeNode(ranks=other)
    node.accept(ROOM)
    node.make_offer(ROOM)
    node.path.tick()
    assert not node.tree.ongoing
    assert declined(node) == ["prefix_gap"]


def test_an_offer_that_the_other_rank_does_not_have_is_declined(other: Other) -> None:
    other.standing = OFFERED._replace(answer=Answer.NONE)
    node = DecodeNode(ranks=other)
    read = node.accept(ROOM)
    node.make_offer(ROOM)
    node.path.tick()
    assert not node.tree.ongoing
    assert declined(node) == ["another rank does not take part"]
    assert not node.reads.pending(ROOM)
    assert read.ended == "another_rank"


def test_pages_in_memory_are_pushed_though_the_other_rank_reads_nothing(other: Other) -> None:
    other.standing = OFFERED._replace(answer=Answer.NONE)
    node = DecodeNode(host_pages=4, ranks=other)
    node.accept(ROOM)
    node.make_offer(ROOM)
    node.path.tick()
    assert node.claims
    assert not declined(node)
    assert not node.reads.pending(ROOM)


def test_a_request_that_the_other_rank_gave_up_does_not_wait_for_an_answer(other: Other) -> None:
    other.standing = OFFERED._replace(answer=Answer.NONE)
    node = DecodeNode(ranks=other)
    node.accept(ROOM)
    node.path.tick()
    assert not node.reads.pending(ROOM)
    assert [type(message) for message in node.said][-1] is Bye
    node.make_offer(ROOM)  # it was on its way
    node.path.tick()
    assert not node.tree.ongoing
    assert declined(node) == ["settled"]


def test_a_read_that_ended_here_after_all_agreed_is_prefetched_all_the_same(other: Other) -> None:
    """Otherwise the other rank's prefetch would be reduced with the next one of this rank."""
    node = DecodeNode(ranks=other)
    read = node.accept(ROOM)
    node.make_offer(ROOM)
    agree = other.least

    def agree_then_end(values: Sequence[int]) -> list[int]:
        with node.reads.lock:
            node.reads.fall_back(read, "prefill_silent")
            node.reads.settle(read)
        return agree(values)

    other.least = agree_then_end  # type: ignore[method-assign]
    node.path.tick()
    (operation,) = node.tree.ongoing.values()
    assert node.reads.pending(ROOM), "the request must not go on before what was prefetched is inserted"
    assert node.path.page_get(operation, hashes(0, 8)) == 0
    node.end_transfer(operation, got=0)
    assert not node.reads.pending(ROOM)


def test_locks_stay_until_the_read_is_over_on_the_other_rank(other: Other) -> None:
    node = DecodeNode(host_pages=3, ranks=other)
    node.accept(ROOM)
    node.leave(ROOM)
    node.path.tick()
    assert node.tree.locked == 1
    assert node.path.accept(_request(), object()) is None, "its room is free on one rank alone"
    other.standing = OVER
    node.path.tick()
    assert node.tree.locked == 0
    assert not node.reads.reads


def test_a_request_whose_prefill_rank_is_not_known_yet_is_given_up_at_its_deadline_alone() -> None:
    """SGLang itself holds it back until it knows which data-parallel rank has it, so our silence clock waits."""
    node = DecodeNode()
    read = node.reads.accepted(ROOM, "request", match_pages=0, held_slots=[], held_hashes=[])
    node.reads.clock = lambda: read.deadline_s - 0.01
    node.reads.tick(0.0)
    assert node.reads.pending(ROOM)
    node.reads.clock = lambda: read.deadline_s
    node.reads.tick(0.0)
    assert not node.reads.pending(ROOM)


def _request() -> object:
    from tests.hicache.decode_side import Request

    return Request(ROOM, "again", list(range(8 * PAGE_TOKENS)))
