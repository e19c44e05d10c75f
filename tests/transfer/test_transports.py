"""What transports copy without an engine, what they ask of Mooncake's, and how pages become descriptors."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dualpath.errors import NotPushedError, TransferError
from sglang_dualpath.transfer import (
    Descriptor,
    MemoryTransport,
    Peer,
    PlaneGeometry,
    PoolGeometry,
    Transport,
    coalesce,
    push_plan,
)
from sglang_dualpath.transfer.mooncake import MooncakeTransport


@pytest.fixture
def pair() -> Iterator[tuple[MemoryTransport, MemoryTransport]]:
    transports = MemoryTransport("here"), MemoryTransport("there")
    yield transports
    for transport in transports:
        transport.close()


class Buffer:
    """Memory whose pages are of two bytes."""

    def __init__(self, text: bytes) -> None:
        self.memory = ctypes.create_string_buffer(text, len(text))
        self.address = ctypes.addressof(self.memory)
        self.pool = pool(self.address, len(text) // 2)

    @property
    def text(self) -> bytes:
        return self.memory.raw


def pool(base: int, slots: int, page_bytes: int = 2) -> PoolGeometry:
    return PoolGeometry((PlaneGeometry(base, page_bytes, page_bytes),), slots)


def test_memory_copies_into_what_the_peer_registered(pair: tuple[MemoryTransport, MemoryTransport]) -> None:
    here, there = pair
    source, target = Buffer(b"0011223344"), Buffer(b"----------")
    here.register(source.pool)
    there.register(target.pool)
    here.push(Peer("there", b"", target.pool), [0, 1, 4], [2, 3, 0])
    assert target.text == b"44--0011--"


@pytest.mark.parametrize("offset", [-2, 10, 100])
def test_memory_refuses_what_is_not_registered(pair: tuple[MemoryTransport, MemoryTransport], offset: int) -> None:
    here, there = pair
    source, target = Buffer(b"x" * 10), Buffer(b"-" * 32)
    here.register(source.pool)
    there.register(pool(target.address, 5))
    with pytest.raises(TransferError, match="not registered"):
        here.push(Peer("there", b"", pool(target.address + offset, 5)), [0], [0])
    assert target.text == b"-" * 32


def test_memory_refuses_a_session_that_is_not_open(pair: tuple[MemoryTransport, MemoryTransport]) -> None:
    here, there = pair
    here.register(pool(0, 1))
    there.close()
    there.close()
    with pytest.raises(TransferError, match="'there'"):
        here.push(Peer("there", b"", pool(0, 1)), [], [])


def test_memory_refuses_a_session_that_is_open(pair: tuple[MemoryTransport, MemoryTransport]) -> None:
    with pytest.raises(TransferError, match="already open"):
        MemoryTransport("here")


# -- Mooncake ----------------------------------------------------------------------------------------------------------


class Engine:
    """Mooncake's interface as SGLang wraps it."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.calls: list[tuple[str, list[int], list[int], list[int]]] = []
        self.status = 0

    def get_session_id(self) -> str:
        return "10.0.0.1:12345"

    def register(self, address: int, length: int) -> None:
        if length > 10_000:
            raise RuntimeError("no memory")
        self.registered[address] = length

    def deregister(self, address: int) -> None:
        del self.registered[address]

    def batch_transfer_sync(self, session: str, sources: list[int], targets: list[int], lengths: list[int]) -> int:
        self.calls.append((session, sources, targets, lengths))
        return self.status


def test_mooncake_registers_and_undoes_it() -> None:
    engine = Engine()
    transport: Transport = MooncakeTransport(engine)
    transport.register(PoolGeometry((PlaneGeometry(100, 10, 10), PlaneGeometry(500, 20, 20)), 3))
    assert engine.registered == {100: 30, 500: 60}
    assert (transport.session, transport.metadata) == ("10.0.0.1:12345", b"")
    transport.close()
    transport.close()
    assert not engine.registered


def test_mooncake_says_what_it_could_not_register() -> None:
    with pytest.raises(TransferError, match="memlock"):
        MooncakeTransport(Engine()).register(pool(100, 2, 10_000))


def test_mooncake_splits_long_batches() -> None:
    engine = Engine()
    transport = MooncakeTransport(engine)
    transport.register(pool(0, 5000))
    transport.push(Peer("peer", b"", pool(10_000, 5000)), range(2500), range(0, 5000, 2))
    assert [len(lengths) for *_, lengths in engine.calls] == [1024, 1024, 452]
    assert {session for session, *_ in engine.calls} == {"peer"}
    assert [source for _, sources, _, _ in engine.calls for source in sources] == list(range(0, 5000, 2))
    assert [target for _, _, targets, _ in engine.calls for target in targets] == list(range(10_000, 20_000, 4))


def test_mooncake_reports_a_failed_push_and_that_bytes_may_come_later() -> None:
    engine = Engine()
    engine.status = -1
    transport = MooncakeTransport(engine)
    transport.register(pool(0, 2))
    with pytest.raises(TransferError, match="-1") as caught:
        transport.push(Peer("peer", b"", pool(0, 2)), [0], [1])
    assert caught.value.over()
    assert transport.drain_s > 30


@pytest.mark.parametrize(("timeout", "drain_s"), [("300", 600.0), ("5", 60.0), ("soon", 60.0)])
def test_mooncake_drains_as_long_as_its_own_timeout_asks(
    monkeypatch: pytest.MonkeyPatch, timeout: str, drain_s: float
) -> None:
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", timeout)
    assert MooncakeTransport(Engine()).drain_s == drain_s


# -- geometry ----------------------------------------------------------------------------------------------------------


def test_planes_side_by_side_are_one_region_that_ends_with_their_last_page() -> None:
    # K and V of a page next to each other: no layout that is served has it so, but geometry allows it.
    planes = (PlaneGeometry(100, 20, 10), PlaneGeometry(110, 20, 10))
    assert PoolGeometry(planes, 4).regions() == [(100, 80)]
    assert PoolGeometry((PlaneGeometry(100, 20, 10), PlaneGeometry(500, 10, 10)), 4).regions() == [(100, 70), (500, 40)]


def test_a_plan_copies_each_page_of_each_plane_and_joins_neighbours() -> None:
    ours = PoolGeometry((PlaneGeometry(0, 10, 10), PlaneGeometry(1000, 5, 5)), 9)
    theirs = PoolGeometry((PlaneGeometry(5000, 10, 10), PlaneGeometry(7000, 8, 5)), 9)
    assert push_plan(ours, [1, 2], theirs, [4, 5]) == [
        Descriptor(10, 5040, 20),
        Descriptor(1005, 7032, 5),
        Descriptor(1010, 7040, 5),
    ]


def test_a_plan_needs_equal_pages_and_counts() -> None:
    with pytest.raises(NotPushedError, match="differ"):
        push_plan(pool(0, 4, 10), [1], pool(0, 4, 9), [1])
    with pytest.raises(NotPushedError, match="1 source pages for 2"):
        push_plan(pool(0, 4), [1], pool(0, 4), [1, 2])


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 3)), max_size=20).map(
        lambda items: [Descriptor(*item) for item in items]
    )
)
def test_coalescing_keeps_every_byte_in_order(descriptors: list[Descriptor]) -> None:
    def copies(items: list[Descriptor]) -> list[tuple[int, int]]:
        return [(one.source + byte, one.destination + byte) for one in items for byte in range(one.length)]

    joined = coalesce(descriptors)
    assert copies(joined) == copies(descriptors)
    for one, next_one in itertools.pairwise(joined):
        assert (one.source + one.length, one.destination + one.length) != (next_one.source, next_one.destination)
