"""NIXL where things go wrong, between real agents in two processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from benchmarks.micro.fabrics import fabric
from benchmarks.micro.workers import Worker
from sglang_dualpath.transfer import Peer, PoolGeometry
from tests.transfer.ends import SLOTS, End


def start(stack: ExitStack, name: str, *settings: Any) -> Worker:
    # Over TCP, as only there a frozen peer holds a write up: through shared memory UCX writes into its pages directly.
    environment = {
        **fabric("nixl").environment,
        "UCX_TLS": "tcp,self",
        "OMP_NUM_THREADS": "1",
        "NIXL_TELEMETRY_ENABLE": "y",
    }
    return stack.enter_context(Worker(name, End, "nixl", *settings, environment=environment))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def test_a_frozen_peer_is_overdue_and_gets_all_of_the_write_when_it_wakes(stack: ExitStack) -> None:
    """Why the last word on such a push must wait: nothing that NIXL offers calls its bytes back."""
    # The deadline also holds for the pushes that are not held up, on a busy machine.
    here, there = start(stack, "here", 512, 3.0), start(stack, "there", 512)
    peer = there.call("peer")
    assert here.call("push", peer, [0], [0]) is None
    wanted = here.call("page", 5)
    assert there.call("page", 5) != wanted
    pid = there.call("pid")
    os.kill(pid, signal.SIGSTOP)
    try:
        said = here.call("push", peer, list(range(SLOTS)), list(range(SLOTS)))
        assert said is not None
        assert "not ended" in said
        assert not here.call("over", 0.2)
        again = here.call("push", peer, [1], [1])
        assert again is not None
        assert "earlier push" in again
    finally:
        os.kill(pid, signal.SIGCONT)
    here.call("forget_last")
    assert here.call("over", 20.0)
    assert there.call("page", 5) == wanted
    assert there.call("page", 1) == here.call("page", 1)
    assert here.call("push", peer, [2], [3]) is None
    assert there.call("page", 3) == here.call("page", 2)


def test_a_peer_that_died_is_an_error_and_its_successor_is_reached(stack: ExitStack) -> None:
    here, there = start(stack, "here"), start(stack, "there")
    peer = there.call("peer")
    assert here.call("push", peer, [0], [0]) is None
    os.kill(there.call("pid"), signal.SIGKILL)
    assert here.call("push", peer, [1], [1]) is not None
    assert here.call("push", peer, [1], [1]) is not None
    successor = start(stack, "successor")
    assert here.call("push", successor.call("peer"), [1], [1]) is None
    assert successor.call("page", 1) == here.call("page", 1)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda peer: peer._replace(metadata=b""), "did not say"),
        (lambda peer: peer._replace(metadata=b"junk"), "cannot write"),
        (lambda peer: peer._replace(metadata=peer.metadata[: len(peer.metadata) // 2]), "cannot write"),
        (lambda peer: peer._replace(session="somebody else"), "metadata is that of"),
        (lambda peer: peer._replace(pool=PoolGeometry(peer.pool.planes, SLOTS + 1000)), "cannot write"),
        (lambda peer: peer._replace(pool=PoolGeometry(peer.pool.planes, 2)), "cannot write"),
    ],
    ids=["nothing", "junk", "half", "of another", "too large", "a slot beyond its end"],
)
def test_a_peer_that_says_wrong_things_of_itself_is_an_error_and_a_right_one_is_reached_after_it(
    reachable: tuple[Worker, Worker], wrong: Callable[[Peer], Peer], says: str
) -> None:
    here, there = reachable
    peer = there.call("peer")
    there.call("fill", 7)
    untouched = there.call("pages")
    said = here.call("push", wrong(peer), [3], [3])
    assert said is not None
    assert says in said
    assert there.call("pages") == untouched
    assert here.call("push", peer, [5], [4]) is None
    assert there.call("page", 4) == here.call("page", 5)


def test_neighbours_become_one_piece_of_each_plane_that_has_no_gaps(reachable: tuple[Worker, Worker]) -> None:
    here, there = reachable
    peer = there.call("peer")
    first_plane, second_plane = 1, 4  # whose pages are 512 bytes apart
    assert here.call("pieces", peer, [2, 3, 4, 5], [6, 7, 8, 9]) == first_plane + second_plane
    assert here.call("pieces", peer, [2, 3, 4, 5], [9, 8, 7, 6]) == 4 + second_plane


@pytest.fixture(scope="module")
def reachable() -> Iterator[tuple[Worker, Worker]]:
    with ExitStack() as made:
        yield start(made, "here"), start(made, "there")
