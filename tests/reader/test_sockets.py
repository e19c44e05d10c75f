"""The same reads over the real control sockets on loopback and the in-process transport."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import msgspec
import pytest

from sglang_dualpath import metrics
from sglang_dualpath.config import DualPathConfig
from sglang_dualpath.control import ControlClient, ControlServer
from sglang_dualpath.ledger import Reserve
from sglang_dualpath.policy import load_policy
from sglang_dualpath.reader.decode import DecodeReads, Phase
from sglang_dualpath.reader.hop import HopReader
from sglang_dualpath.reader.offers import OfferDesk
from sglang_dualpath.reader.own import OwnReaders
from sglang_dualpath.reader.prefetch import Prefetch, ReadLimit
from sglang_dualpath.reader.prefill import PrefillReads
from sglang_dualpath.transfer import MemoryTransport
from tests.reader.cluster import PATIENT, prompt, wait_for
from tests.reader.host import Slots, Storage, content

KEY = b"0123456789abcdef-key"
PAGES = 24


class Pair:
    """One prefill and one decode engine, joined by sockets."""

    def __init__(self, policy: str, config: DualPathConfig = PATIENT) -> None:
        self.storage = Storage()
        self.errors: list[str] = []
        self.pools = {name: Slots(128) for name in ("prefill-1", "decode-1")}
        self.transports = {name: MemoryTransport(name) for name in self.pools}
        for name, transport in self.transports.items():
            transport.register(self.pools[name].pages.geometry)
        pool = self.pools["prefill-1"]
        self.reserve = Reserve(pool.alloc(16))
        self.prefill = PrefillReads(config=config, pages=pool.pages, reserve=self.reserve)
        desk = OfferDesk(
            self.prefill,
            policy=load_policy(policy),
            engine="prefill-1",
            session="prefill-1",
            send=lambda peer, message: self.server.send(peer, message),
        )
        self.server = ControlServer(
            "127.0.0.1",
            KEY,
            desk.handle,
            self.errors.append,
            handler_gone=desk.gone,
            tick=desk.tick,
            tick_s=0.02,
            gone_grace_s=0.3,
        )
        self.decode = DecodeReads(
            config=config,
            pages=self.pools["decode-1"].pages,
            engine="decode-1",
            rank=0,
            send=lambda endpoint, message: self.client.send(endpoint, message),
        )
        self.client = ControlClient(
            "decode-1", KEY, self.decode.handle, self.errors.append, tick=self.decode.tick, tick_s=0.02
        )
        self.own = OwnReaders(self.prefill, count=1, limit=ReadLimit(0))
        self.hop = HopReader(self.decode, self.transports["decode-1"], count=1, limit=ReadLimit(0))

    def prefetch(self, engine: str, hashes: list[str]) -> Prefetch:
        pool = self.pools[engine]
        return Prefetch(
            handle=engine,
            first_page=0,
            stored_pages=len(hashes),
            hashes=hashes,
            host_indices=pool.pages.indices(pool.alloc(len(hashes))),
            read_pages=lambda first, slots: self.storage.read(hashes[first : first + len(slots)], pool, slots, engine),
            is_cancelled=lambda: False,
        )

    def check(self, engine: str, prefetch: Prefetch, pages: int) -> None:
        slots = self.pools[engine].pages.slots_of(prefetch.host_indices)
        for page_hash, slot in list(zip(prefetch.hashes, slots, strict=True))[:pages]:
            assert self.pools[engine].read(slot) == content(page_hash)

    def close(self) -> None:
        self.prefill.stop()
        self.decode.stop()
        self.own.stop()
        self.hop.stop()
        self.client.close()
        self.server.close()
        for transport in self.transports.values():
            transport.close()


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("policy", ["split", "decode", "prefill"])
def test_a_read_over_real_sockets(closing: ExitStack, policy: str) -> None:
    pair = Pair(policy)
    closing.callback(pair.close)
    hashes = prompt("a", PAGES)
    pair.storage.put(hashes)
    pair.storage.gate.clear()  # the prefill engine does not end the read before its offer is here
    read = pair.decode.accepted(7, "request", match_pages=0, held_slots=[], held_hashes=[])
    pair.decode.greet(read, pair.server.endpoint)
    wait_for(lambda: 7 in pair.prefill.rooms)
    ours = pair.prefetch("prefill-1", hashes)
    pair.prefill.arrived(7, ours.handle)
    pair.prefill.opened(ours)
    waiting = threading.Thread(target=lambda: (pair.prefill.wait(ours, 0, PAGES), pair.prefill.finish(ours)))
    waiting.start()
    wait_for(lambda: read.phase in (Phase.OFFERED, Phase.SETTLED))
    pair.storage.gate.set()
    if read.phase is Phase.OFFERED:
        theirs = pair.prefetch("decode-1", hashes)
        pair.decode.submitted(read)
        pair.decode.opened(read, theirs)
        kept = pair.decode.wait(theirs, 0, PAGES)
        pair.decode.finish(theirs)
        pair.decode.settled(read)
        pair.check("decode-1", theirs, kept)
    else:
        assert policy == "prefill"
    waiting.join(10)
    assert not waiting.is_alive()
    pair.check("prefill-1", ours, PAGES)
    assert set(pair.storage.reads.values()) == {1}
    assert not pair.decode.pending(7)
    wait_for(lambda: pair.decode.standing(read).over)
    pair.decode.forget(read)
    assert pair.reserve.free == pair.reserve.size
    assert not pair.errors


def test_the_gauges_say_what_is_queued_and_what_is_spare(closing: ExitStack) -> None:
    pair = Pair("split")
    closing.callback(pair.close)
    pair.client.close()  # the decode engine would set the same gauge
    pair.storage.gate.clear()
    hashes = prompt("a", PAGES)
    pair.storage.put(hashes)
    ours = pair.prefetch("prefill-1", hashes)
    pair.prefill.opened(ours)
    wait_for(lambda: metrics.RESERVE_SLOTS.value(state="free") == 16)
    wait_for(lambda: metrics.READ_QUEUE_BYTES.value() > 0)
    pair.storage.gate.set()
    assert pair.prefill.wait(ours, 0, PAGES) == PAGES
    pair.prefill.finish(ours)
    wait_for(lambda: metrics.READ_QUEUE_BYTES.value() == 0)


def test_a_client_that_closes_is_gone_and_its_claims_are_taken_back(closing: ExitStack) -> None:
    # Long before the lease ends: that it is gone is found out by what it is sent, a third of this time later.
    pair = Pair("decode", msgspec.structs.replace(PATIENT, hello_silence_s=3.0))
    closing.callback(pair.close)
    hashes = prompt("a", PAGES)
    pair.storage.put(hashes)
    read = pair.decode.accepted(7, "request", match_pages=0, held_slots=[], held_hashes=[])
    pair.decode.greet(read, pair.server.endpoint)
    wait_for(lambda: 7 in pair.prefill.rooms)
    ours = pair.prefetch("prefill-1", hashes)
    pair.prefill.arrived(7, ours.handle)
    pair.prefill.opened(ours)
    wait_for(lambda: read.phase is Phase.OFFERED)
    pair.hop.stop()  # nobody carries what is granted from here on
    pair.decode.opened(read, pair.prefetch("decode-1", hashes))
    wait_for(lambda: pair.reserve.backing)
    pair.client.close()
    assert pair.prefill.wait(ours, 0, PAGES) == PAGES
    pair.prefill.finish(ours)
    pair.check("prefill-1", ours, PAGES)
    wait_for(lambda: pair.reserve.free == pair.reserve.size)
    assert not pair.prefill.late
