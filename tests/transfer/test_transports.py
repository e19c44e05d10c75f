"""The hop's transports: what they copy, what they refuse, and how descriptors are joined."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dualpath.errors import TransferError
from sglang_dualpath.transfer import Descriptor, MemoryTransport, Transport, coalesce
from sglang_dualpath.transfer.mooncake import MooncakeTransport


@pytest.fixture
def pair() -> Iterator[tuple[MemoryTransport, MemoryTransport]]:
    transports = MemoryTransport("here"), MemoryTransport("there")
    yield transports
    for transport in transports:
        transport.close()


class Buffer:
    def __init__(self, text: bytes) -> None:
        self.memory = ctypes.create_string_buffer(text, len(text))
        self.address = ctypes.addressof(self.memory)

    @property
    def text(self) -> bytes:
        return self.memory.raw


def test_memory_copies_into_what_the_peer_registered(pair: tuple[MemoryTransport, MemoryTransport]) -> None:
    here, there = pair
    source, target = Buffer(b"0123456789"), Buffer(b"----------")
    there.register([(target.address, 10)])
    here.push(
        "there", [Descriptor(source.address, target.address + 2, 3), Descriptor(source.address + 7, target.address, 1)]
    )
    assert target.text == b"7-012-----"


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (8, 3), (20, 1)])
def test_memory_refuses_what_is_not_registered(
    pair: tuple[MemoryTransport, MemoryTransport], offset: int, length: int
) -> None:
    here, there = pair
    source, target = Buffer(b"x" * 10), Buffer(b"-" * 32)
    there.register([(target.address, 10)])
    with pytest.raises(TransferError, match="not registered"):
        here.push("there", [Descriptor(source.address, target.address + offset, length)])
    assert target.text == b"-" * 32


def test_memory_refuses_a_session_that_is_not_open(pair: tuple[MemoryTransport, MemoryTransport]) -> None:
    here, there = pair
    there.close()
    there.close()
    with pytest.raises(TransferError, match="'there'"):
        here.push("there", [])


def test_memory_refuses_a_session_that_is_open(pair: tuple[MemoryTransport, MemoryTransport]) -> None:
    with pytest.raises(TransferError, match="already open"):
        MemoryTransport("here")


class Engine:
    """Mooncake's interface as SGLang wraps it."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.calls: list[tuple[str, list[int], list[int], list[int]]] = []
        self.status = 0

    def get_session_id(self) -> str:
        return "10.0.0.1:12345"

    def register(self, address: int, length: int) -> None:
        if length > 1000:
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
    transport.register([(100, 10), (200, 20)])
    assert engine.registered == {100: 10, 200: 20}
    transport.close()
    transport.close()
    assert not engine.registered


def test_mooncake_says_what_it_could_not_register() -> None:
    with pytest.raises(TransferError, match="memlock"):
        MooncakeTransport(Engine()).register([(100, 2000)])


def test_mooncake_splits_long_batches() -> None:
    engine = Engine()
    descriptors = [Descriptor(number, number * 2, 1) for number in range(2500)]
    MooncakeTransport(engine).push("peer", descriptors)
    assert [len(lengths) for *_, lengths in engine.calls] == [1024, 1024, 452]
    assert [source for _, sources, _, _ in engine.calls for source in sources] == list(range(2500))


def test_mooncake_reports_a_failed_push_and_that_bytes_may_come_later() -> None:
    engine = Engine()
    engine.status = -1
    transport = MooncakeTransport(engine)
    with pytest.raises(TransferError, match="-1"):
        transport.push("peer", [Descriptor(1, 2, 3)])
    assert transport.drain_s > 30


@pytest.mark.parametrize(("timeout", "drain_s"), [("300", 600.0), ("5", 60.0), ("soon", 60.0)])
def test_mooncake_drains_as_long_as_its_own_timeout_asks(
    monkeypatch: pytest.MonkeyPatch, timeout: str, drain_s: float
) -> None:
    monkeypatch.setenv("MC_TRANSFER_TIMEOUT", timeout)
    assert MooncakeTransport(Engine()).drain_s == drain_s


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
