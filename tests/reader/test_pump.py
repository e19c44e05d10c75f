"""Which read of a decode engine claims next, within which bounds."""

from __future__ import annotations

import math

import msgspec
import pytest
import torch

from sglang_dualpath.protocol import Cancelled, Claim, Grant, Message, Offer, Plane, Target
from sglang_dualpath.reader.decode import DecodeReads
from sglang_dualpath.reader.decode_read import Asked, Chunk, DecodeRead
from sglang_dualpath.reader.prefetch import Prefetch, Rate
from sglang_dualpath.reader.pump import ClaimPump
from tests.reader.cluster import CONFIG
from tests.reader.host import Slots

OFFER = Offer(
    room=0,
    attempt=0,
    first_page=0,
    end_page=100,
    storage_end_page=100,
    end_hash="",
    target=Target("s", (Plane(0, 1, 1),), 9),
    lease_s=1.0,
    chunk_pages=50,
    limit_pages=None,
    engine="p",
)


def open_read(room: int, endpoint: str = "p", *, memory_pages: int = 0) -> DecodeRead:
    read = DecodeRead(room, room, endpoint, 0, [], [], deadline_s=1e9, heard_s=0.0, offer=OFFER)
    read.memory_left = memory_pages
    read.prefetch = Prefetch(room, 0, 100, [""] * 100, torch.zeros(0), lambda first, slots: 0, lambda: False)
    return read


def grant(claim_id: int, *, memory: bool = False) -> Grant:
    return Grant(0, 0, 0, claim_id, 0, (1,), memory, 1.0)


def claims(reads: list[DecodeRead], now_s: float = 0.0) -> list[int]:
    rooms = []
    for read in ClaimPump(CONFIG).next_claims({read.room: read for read in reads}, now_s):
        read.requested[len(rooms)] = Asked(now_s, read.memory_left > 0)
        rooms.append(read.room)
    return rooms


def test_the_oldest_read_claims_first_and_no_more_than_is_in_flight() -> None:
    assert claims([open_read(1), open_read(2)]) == [1, 1]


def test_every_reader_thread_has_a_claim_to_go_on_with() -> None:
    pump = ClaimPump(msgspec.structs.replace(CONFIG, reader_threads=3))
    read = open_read(1)
    for number, _ in enumerate(pump.next_claims({1: read}, 0.0)):
        read.requested[number] = Asked(0.0, False)
    assert len(read.requested) == 4


def test_memory_has_a_budget_of_its_own() -> None:
    assert claims([open_read(1), open_read(2, memory_pages=9), open_read(3)]) == [1, 1, 2, 2]


def test_without_host_pages_memory_is_claimed_once_at_a_time() -> None:
    read = open_read(1, memory_pages=9)
    read.prefetch = None
    assert claims([read]) == [1]


def test_claims_that_nobody_answered_for_a_lease_do_not_stop_other_engines() -> None:
    frozen, well = open_read(1, "frozen"), open_read(2, "well")
    frozen.requested = {7: Asked(0.0, False), 8: Asked(0.0, False)}
    assert claims([frozen, well], now_s=CONFIG.lease_s * 0.9) == []
    # Another two to the frozen engine at most, however long it takes.
    assert claims([frozen, well], now_s=CONFIG.lease_s) == [1, 1]
    assert claims([frozen, well], now_s=2 * CONFIG.lease_s) == [2, 2]


def test_what_is_read_and_pushed_counts_for_its_engine() -> None:
    stuck, well = open_read(1, "stuck"), open_read(2, "well")
    stuck.busy = [Chunk(stuck, grant(number), 1.0, reading=False) for number in range(3)]
    assert claims([stuck, well]) == [1, 2]
    stuck.busy.append(Chunk(stuck, grant(4), 1.0, reading=True))
    assert claims([stuck, well]) == []


def test_a_refused_read_waits_before_it_asks_again() -> None:
    read = open_read(1)
    read.claim_again_s = 5.0
    assert claims([read], now_s=4.9) == []
    assert claims([read], now_s=5.0) == [1, 1]


def test_a_refused_claim_is_repeated_when_it_is_due() -> None:
    first, second, over = open_read(1), open_read(2), open_read(3)
    first.claim_again_s, second.claim_again_s, over.claim_again_s, over.ended = 7.0, 6.5, 6.1, "met"
    reads = {1: first, 2: second, 3: over}
    pump = ClaimPump(CONFIG)
    assert pump.repeat_in_s(reads, 6.0) == 0.5
    assert pump.repeat_in_s(reads, 6.5) == 0.5
    assert pump.repeat_in_s(reads, 7.0) == math.inf


def decode_reads() -> tuple[DecodeReads, list[Message]]:
    """Reads of a decode engine, and what it says."""
    said: list[Message] = []

    def send(endpoint: str, message: Message) -> None:
        said.append(message)

    return DecodeReads(config=CONFIG, pages=Slots(8).pages, engine="d", rank=0, send=send), said


def test_a_reader_that_waits_wakes_to_repeat_a_claim() -> None:
    reads, said = decode_reads()
    read = reads.reads[1] = open_read(1)
    read.claim_again_s = reads.clock() + 0.1
    # Much longer than that: nothing else would wake it.
    assert reads.carriage.next_chunk(20.0) is None
    assert reads.clock() < read.claim_again_s + 10.0
    reads.carriage.next_chunk(0.0)
    assert [type(word) for word in said] == [Claim, Claim]


def test_chunks_overdue_beside_the_last_that_may_be_lost_are_all_given_back() -> None:
    reads, said = decode_reads()
    read = reads.reads[1] = open_read(1)
    read.granted.extend(Chunk(read, grant(number), deadline_s=0.0) for number in range(3))
    read.leases_lost = 2 * reads.claims.claims_per_engine
    with reads.lock:
        reads.drop_overdue()
    assert [word.claim_id for word in said if isinstance(word, Cancelled)] == [0, 1, 2]
    assert read.ended == "lease_over_unread"


def test_chunks_in_memory_are_carried_first() -> None:
    first, second = open_read(1), open_read(2)
    reads = {1: first, 2: second}
    pump = ClaimPump(CONFIG)
    assert pump.next_chunk(reads) is None
    first.granted.append(Chunk(first, grant(1), 1.0))
    second.granted.append(Chunk(second, grant(2), 1.0))
    second.granted.append(Chunk(second, grant(3, memory=True), 1.0))
    chosen = pump.next_chunk(reads)
    assert chosen is not None
    assert chosen.grant.claim_id == 3
    second.granted.remove(chosen)
    chosen = pump.next_chunk(reads)
    assert chosen is not None
    assert chosen.grant.claim_id == 1


def test_a_chunk_is_a_small_part_of_a_lease_at_the_measured_rate() -> None:
    rate = Rate()
    rate.add(10_000, 1.0)
    pump = ClaimPump(CONFIG)
    assert pump.claim_pages(OFFER, rate, page_bytes=100) == 16
    assert pump.claim_pages(OFFER, rate, page_bytes=10**6) == 1
    rate.add(10**9, 0.1)
    assert pump.claim_pages(OFFER, rate, page_bytes=100) == 50


def test_a_chunk_is_a_small_part_of_a_lease_at_the_limit_if_that_is_less() -> None:
    pump = ClaimPump(msgspec.structs.replace(CONFIG, read_rate_limit_bytes_per_s=10_000))
    rate = Rate()
    assert pump.claim_pages(OFFER, rate, page_bytes=100) == 16, "before the first measurement"
    rate.add(10**9, 0.1)
    assert pump.claim_pages(OFFER, rate, page_bytes=100) == 16
    slow = Rate()
    slow.add(5_000, 1.0)
    assert pump.claim_pages(OFFER, slow, page_bytes=100) == 8


@pytest.mark.parametrize("limit", [0, 100])
def test_an_offer_without_a_lease_stops_nothing(limit: int) -> None:
    config = msgspec.structs.replace(CONFIG, read_rate_limit_bytes_per_s=limit)
    assert ClaimPump(config).claim_pages(msgspec.structs.replace(OFFER, lease_s=0.0), Rate(), page_bytes=100) >= 1
