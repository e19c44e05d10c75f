"""What every transport does, each over its own engine, between two processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from benchmarks.micro.fabrics import fabric
from benchmarks.micro.workers import Worker
from sglang_dualpath.transfer import Peer, PlaneGeometry, PoolGeometry
from tests.transfer.ends import SLOTS, End

KINDS = ("memory", "mooncake", "nixl-shm", "nixl-tcp")
UCX = {"nixl-shm": {"UCX_TLS": "posix,sysv,cma,self,tcp"}, "nixl-tcp": {"UCX_TLS": "tcp,self"}}


class Here:
    """Stands in for a worker where both ends must be in one process."""

    def __init__(self, end: End) -> None:
        self.end = end

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.end, method)(*arguments)


class Two:
    """Two ends of one kind."""

    def __init__(self, kind: str, stack: ExitStack) -> None:
        self.kind = kind
        if kind == "memory":
            ends = [End(kind), End(kind)]
            for end in ends:
                stack.callback(end.close)
            self.here, self.there = (Here(end) for end in ends)
            return
        engine = kind.partition("-")[0]
        environment = {**fabric(engine).environment, **UCX.get(kind, {}), "OMP_NUM_THREADS": "1"}
        self.here, self.there = (  # type: ignore[assignment]
            stack.enter_context(Worker(name, End, engine, environment=environment)) for name in ("here", "there")
        )


@pytest.fixture(scope="module", params=KINDS)
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    with ExitStack() as stack:
        yield Two(request.param, stack)


@pytest.fixture(autouse=True)
def fresh(two: Two) -> None:
    two.here.call("fill", 1)
    two.there.call("fill", 2)


def expected(two: Two, moves: Sequence[tuple[int, int]]) -> list[bytes]:
    """The pages there after these (source, target) slots were copied."""
    ours, theirs = two.here.call("pages"), two.there.call("pages")
    for source, target in moves:
        theirs[target] = ours[source]
    return list(theirs)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ([0], [0]),
        ([3, 4, 5, 6], [7, 8, 9, 10]),
        ([11, 2, 7, 0], [1, 9, 0, 11]),
        ([5, 6, 1, 2], [2, 3, 10, 11]),
        (list(range(SLOTS)), list(reversed(range(SLOTS)))),
    ],
    ids=["one", "neighbours", "scattered", "two runs", "all"],
)
def test_every_page_arrives_whole_and_nothing_else_changes(two: Two, source: list[int], target: list[int]) -> None:
    wanted = expected(two, list(zip(source, target, strict=True)))
    assert two.here.call("push", two.there.call("peer"), source, target) is None
    # Looked at in the other process at once: the push has returned, so all of it is there.
    assert two.there.call("pages") == wanted
    assert two.there.call("gaps_are_untouched")


def test_pushes_go_both_ways(two: Two) -> None:
    ours, theirs = two.here.call("pages"), two.there.call("pages")
    assert two.here.call("push", two.there.call("peer"), [1], [2]) is None
    assert two.there.call("push", two.here.call("peer"), [3], [4]) is None
    assert two.there.call("page", 2) == ours[1]
    assert two.here.call("page", 4) == theirs[3]


def test_several_threads_may_push_at_once(two: Two) -> None:
    pushes = [([slot], [SLOTS - 1 - slot]) for slot in range(SLOTS)]
    wanted = expected(two, [(source[0], target[0]) for source, target in pushes])
    assert two.here.call("push_at_once", two.there.call("peer"), pushes) == [None] * SLOTS
    assert two.there.call("pages") == wanted


def test_a_push_of_nothing_does_nothing(two: Two) -> None:
    wanted = two.there.call("pages")
    assert two.here.call("push", two.there.call("peer"), [], []) is None
    assert two.there.call("pages") == wanted


def test_memory_that_was_given_up_and_registered_again_is_written(two: Two) -> None:
    assert two.here.call("push", two.there.call("peer"), [1], [1]) is None
    peer: Peer = two.there.call("again")
    wanted = expected(two, [(2, 2)])
    assert two.here.call("push", peer, [2], [2]) is None
    assert two.there.call("pages") == wanted


def elsewhere(peer: Peer) -> Peer:
    """The same peer with pages where it has none."""
    planes = tuple(PlaneGeometry(plane.base + (1 << 30), *plane[1:]) for plane in peer.pool.planes)
    return peer._replace(pool=PoolGeometry(planes, peer.pool.slots))


def test_pages_that_the_peer_has_not_registered_are_not_written(two: Two) -> None:
    wanted = two.there.call("pages")
    said = two.here.call("push", elsewhere(two.there.call("peer")), [1], [1])
    assert said
    assert two.there.call("pages") == wanted
    assert two.here.call("push", two.there.call("peer"), [1], [1]) is None


def test_a_session_that_is_not_there_is_an_error(two: Two) -> None:
    peer: Peer = two.there.call("peer")
    said = two.here.call("push", peer._replace(session="127.0.0.1:9"), [1], [1])
    assert said is not None
    assert "127.0.0.1:9" in said
