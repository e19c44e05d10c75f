"""A prefill engine's desk without threads, on a clock that the test moves: what a late word and an ended read leave."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from sglang_dualpath import __version__, metrics
from sglang_dualpath.ledger import Reserve
from sglang_dualpath.policy import load_policy
from sglang_dualpath.protocol import (
    PROTOCOL_VERSION,
    Bye,
    Cancelled,
    Claim,
    Fail,
    Grant,
    Hello,
    Message,
    NoOffer,
    NoOfferReason,
    Offer,
)
from sglang_dualpath.reader.offers import OfferDesk
from sglang_dualpath.reader.prefetch import Prefetch
from sglang_dualpath.reader.prefill import PrefillRead, PrefillReads
from tests.reader.cluster import CONFIG, PAGE_BYTES, prompt
from tests.reader.host import PAGE_TOKENS, PLANE_BYTES, Slots

PEER = b"decode-1"
ROOM = 1


class Desk:
    """One prefill engine and one decode engine, which the test plays."""

    def __init__(self, policy: str = "decode") -> None:
        self.now_s = 100.0
        self.said: list[Message] = []
        self.pool = Slots(64)
        self.reserve = Reserve(self.pool.alloc(8))
        self.reads = PrefillReads(config=CONFIG, pages=self.pool.pages, reserve=self.reserve, clock=lambda: self.now_s)
        self.desk = OfferDesk(
            self.reads,
            policy=load_policy(policy),
            engine="prefill-1",
            session="prefill-1",
            send=lambda peer, message: self.said.append(message),
        )

    def hear(self, message: Message, peer: bytes = PEER) -> None:
        self.desk.handle(peer, message)

    def greet(
        self,
        *,
        held: int = 0,
        rank: int = 0,
        tp_size: int = 1,
        room: int = ROOM,
        peer: bytes = PEER,
        read_bytes_per_s: float | None = None,
    ) -> None:
        """The decode engine asks about a request."""
        self.hear(
            Hello(
                room=room,
                version=PROTOCOL_VERSION,
                package=__version__,
                rank=rank,
                engine=peer.decode(),
                page_tokens=PAGE_TOKENS,
                page_bytes=PAGE_BYTES,
                plane_bytes=PLANE_BYTES,
                tp_size=tp_size,
                match_pages=held,
                held_end_page=held,
                read_bytes_per_s=read_bytes_per_s,
            ),
            peer,
        )

    def prefetch(
        self,
        pages: int = 6,
        *,
        held: int = 0,
        room: int = ROOM,
        peer: bytes = PEER,
        read_bytes_per_s: float | None = None,
    ) -> Prefetch:
        """A decode engine asks about a request, whose prefetch then gets its host pages."""
        self.greet(held=held, room=room, peer=peer, read_bytes_per_s=read_bytes_per_s)
        self.reads.arrived(room, f"handle {room}")
        return Prefetch(
            handle=f"handle {room}",
            first_page=0,
            stored_pages=pages - held,
            hashes=prompt("a", pages),
            host_indices=self.pool.pages.indices(self.pool.alloc(pages)),
            read_pages=lambda first, slots: len(slots),
            is_cancelled=lambda: False,
        )

    def granted(self) -> tuple[PrefillRead, Grant]:
        read = self.reads.opened(self.prefetch())
        assert read is not None
        self.hear(Claim(ROOM, 0, 1, 3))
        (grant,) = [message for message in self.said if isinstance(message, Grant)]
        return read, grant


@pytest.mark.parametrize(
    ("theirs", "reason", "sentence"),
    [
        ({"rank": 1}, "rank", "it is rank 1, this engine rank 0"),
        ({"tp_size": 2}, "tp_size", "its --tp-size is 2, this server's 1"),
        ({"rank": 1, "tp_size": 2}, "tp_size", "give both servers the same"),
    ],
)
def test_an_engine_of_another_rank_or_width_is_offered_nothing(
    caplog: pytest.LogCaptureFixture, theirs: dict[str, int], reason: str, sentence: str
) -> None:
    desk = Desk()
    counted = metrics.FALLBACKS.value(reason=reason)
    desk.greet(**theirs)
    assert [message.reason for message in desk.said if isinstance(message, NoOffer)] == [NoOfferReason.VERSION]
    assert metrics.FALLBACKS.value(reason=reason) == counted + 1
    assert sentence in caplog.text


@pytest.mark.parametrize("word", [Fail, Cancelled])
def test_a_failed_push_of_an_engine_that_was_frozen_leaves_its_slots_out_of_use(word: type[Fail | Cancelled]) -> None:
    desk = Desk()
    read, grant = desk.granted()
    # Frozen for longer than the lease: messages that waited in the kernel are handled before the next tick, and before
    # the transfer engine has copied what waited there, too.
    desk.now_s += 2 * CONFIG.lease_s
    desk.hear(Fail(ROOM, 0, grant.claim_id, "timed out") if word is Fail else Cancelled(ROOM, 0, grant.claim_id))
    assert set(read.ledger.slots).isdisjoint(grant.slots), "late bytes would meet pages that were landed again"
    assert desk.reserve.quarantined == (len(grant.slots) if word is Fail else 0)
    desk.now_s += 2 * CONFIG.lease_s
    desk.desk.tick(0.0)
    assert desk.reserve.free == desk.reserve.size
    assert not desk.reads.late


def test_a_failed_push_within_its_lease_gives_its_pages_back() -> None:
    desk = Desk()
    read, grant = desk.granted()
    desk.hear(Fail(ROOM, 0, grant.claim_id, "no route"))
    assert set(grant.slots) <= set(read.ledger.slots)
    assert read.ledger.span_left == (0, 6)
    assert desk.reserve.free == desk.reserve.size


def test_a_read_that_ended_is_not_kept_with_its_room() -> None:
    desk = Desk()
    prefetch = desk.prefetch()
    kept = weakref.ref(prefetch)
    assert desk.reads.opened(prefetch) is not None
    desk.reads.finish(prefetch)
    del prefetch
    gc.collect()
    assert ROOM in desk.reads.rooms, "a late HELLO gets no answer"
    assert kept() is None, "thousands of rooms are remembered, each with its prompt's hashes"


def test_a_decode_engine_that_gets_no_spares_does_not_hold_up_later_reads() -> None:
    desk = Desk()
    prefetch = desk.prefetch(held=6)
    assert desk.reads.opened(prefetch) is not None
    # Another decode engine froze with all the spares: nobody can land these pages, which are in no storage.
    assert desk.reserve.back(desk.reserve.free)
    got: list[int] = []
    waiting = threading.Thread(target=lambda: got.append(desk.reads.wait(prefetch, 0, 6)))
    started_s = desk.now_s
    waiting.start()
    while waiting.is_alive() and desk.now_s < started_s + CONFIG.read_deadline_s / 2:
        desk.now_s += 0.1
        desk.hear(Claim(ROOM, 0, 1, 3))
        waiting.join(0.06)
    in_time = not waiting.is_alive()
    desk.reads.stop()
    waiting.join(10)
    assert in_time, "it waited for a decode engine that only asks"
    assert got == [0]


def test_the_decode_engine_that_ends_last_is_helped_first_by_the_rates_it_reported() -> None:
    desk = Desk("split")
    for room, peer, rate in ((1, b"fast", 9e6), (2, b"slow", 1e6)):
        prefetch = desk.prefetch(12, room=room, peer=peer, read_bytes_per_s=rate)
        assert desk.reads.opened(prefetch) is not None
    desk.reads.rate.add(1_000_000, 1.0)
    claim = desk.reads.next_own_claim(0.0)
    assert claim is not None
    assert claim[0].decode == "slow"
    assert set(desk.reads.decode_rates) == {"fast", "slow"}
    desk.desk.gone(b"slow")
    assert set(desk.reads.decode_rates) == {"fast"}


def test_the_reads_of_a_burst_go_to_both_sides_in_turn() -> None:
    desk = Desk("shorter_queue")
    for room in range(1, 7):
        desk.reads.opened(desk.prefetch(room=room))  # every HELLO of the burst says that nothing is queued yet
    assert [message.room for message in desk.said if isinstance(message, Offer)] == [2, 4, 6]
    # Each side has three reads of six pages before it.
    assert desk.reads.queued_read_bytes() == desk.reads.offered_read_bytes(PEER.decode()) == 18 * PAGE_BYTES


def test_what_a_decode_engine_leaves_is_queued_here() -> None:
    desk = Desk()
    desk.reads.opened(desk.prefetch())
    assert desk.reads.queued_read_bytes() == 0
    desk.hear(Bye(ROOM, 0))
    assert desk.reads.queued_read_bytes() == 6 * PAGE_BYTES
    assert desk.reads.offered_read_bytes(PEER.decode()) == 0


def test_nothing_more_is_begun_of_a_read_past_its_deadline() -> None:
    """Its end would have to wait for that chunk, and so would the requests behind it."""
    desk = Desk("prefill")
    read = desk.reads.opened(desk.prefetch())
    assert read is not None
    desk.now_s = read.deadline_s - 0.01
    assert desk.reads.next_own_claim(0.0) is not None
    desk.now_s = read.deadline_s
    assert desk.reads.next_own_claim(0.0) is None
