"""Aborts, errors and deadlines on either side: reads end in time, bytes are right, and nothing leaks."""

from __future__ import annotations

import time

import msgspec
import pytest

from sglang_dualpath.errors import NotPushedError, TransferError
from sglang_dualpath.protocol import Cancelled, Done, Fail, Grant, NoOffer, Settled
from tests.reader.cluster import CONFIG, PATIENT, Cluster, prompt, shared_read, wait_for

PAGES = 40
AT_ONCE_S = 3.5  # on a busy machine, and less than a lease or a deadline of PATIENT takes


@pytest.mark.parametrize("policy", ["decode", "split"])
def test_a_storage_error_at_decode_is_made_good_by_prefill(cluster: Cluster, policy: str) -> None:
    cluster.storage.latency_s = 0.02
    failed: list[str] = []

    def fail_once(hashes: object) -> None:
        if not failed and cluster.wire.sent(Grant):
            failed.append("x")
            raise OSError("storage is gone")

    cluster.storage.fault = fail_once
    _, decode, job = shared_read(cluster, pages=PAGES, policy=policy)
    assert job.result() == PAGES
    job.check()
    decode.settle(1)
    decode.jobs[1].check()
    assert failed
    cluster.check()


def test_a_storage_error_at_prefill_is_made_good_by_decode(cluster: Cluster) -> None:
    _, decode = cluster.prefill(policy="split"), cluster.decode()
    hashes = cluster.stored("a", PAGES)
    cluster.storage.latency_s = 0.005
    real = cluster.storage.read

    def read(hashes: list[str], pool: object, slots: object, writer: str) -> int:
        if "prefill" in writer:
            raise OSError("no route to storage")
        return real(hashes, pool, slots, writer)  # type: ignore[arg-type]

    cluster.storage.read = read  # type: ignore[assignment,method-assign]
    job = cluster.request(hashes)
    # What both could not bring is the end of what is kept; nothing before it is lost.
    job.result()
    job.check()
    decode.settle(1)
    assert cluster.fallbacks("prefill_read_error") >= 1
    cluster.check()


def test_a_page_that_nobody_finds_ends_the_read_before_it(cluster: Cluster) -> None:
    _, decode = cluster.prefill(policy="split"), cluster.decode()
    hashes = cluster.stored("a", PAGES)
    del cluster.storage.pages[hashes[21]]
    job = cluster.request(hashes)
    assert job.result() == 21
    job.check()
    decode.settle(1)
    assert decode.jobs[1].kept <= 21
    decode.jobs[1].check()
    cluster.check()


def test_a_push_that_fails_is_read_by_prefill(cluster: Cluster) -> None:
    _, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", PAGES)

    def refuse(session: str) -> None:
        raise TransferError("link down")

    decode.hop.fault = refuse
    job = cluster.request(hashes)
    assert job.result() == PAGES
    job.check()
    decode.settle(1)
    decode.jobs[1].check()
    assert cluster.fallbacks("push_failed") >= 1
    cluster.check()


def test_a_failed_push_whose_bytes_come_later_harms_nobody(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", PAGES)
    decode.hop.late_write_s, decode.hop.drain_s = 0.8, 3.0
    job = cluster.request(hashes)
    assert job.result() == PAGES
    job.check()
    decode.settle(1)
    assert prefill.reserve.quarantined
    assert not cluster.wire.sent(Fail)
    wait_for(lambda: prefill.reserve.quarantined == 0, "quarantine ended")
    assert decode.hop.written
    assert cluster.wire.sent(Fail)
    job.check()
    cluster.check()


def test_the_word_on_a_push_that_cannot_be_called_back_waits_until_it_has_ended(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", PAGES)
    ended: list[bool] = []
    # It is far longer on its way than any time that could be known beforehand.
    decode.hop.late_write_s, decode.hop.drain_s, decode.hop.over = 1.0, 0.05, lambda: bool(ended)
    job = cluster.request(hashes)
    assert job.result() == PAGES
    decode.settle(1)
    wait_for(lambda: decode.hop.written)
    assert prefill.reserve.quarantined
    assert not cluster.wire.sent(Fail)
    ended.append(True)
    wait_for(lambda: prefill.reserve.quarantined == 0, "quarantine ended")
    assert cluster.wire.sent(Fail)
    job.check()
    cluster.check()


def test_the_word_on_a_push_that_never_began_is_said_at_once(cluster: Cluster) -> None:
    def refuse(session: str) -> None:
        raise NotPushedError("an earlier push has not ended yet")

    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    decode.hop.fault, decode.hop.drain_s = refuse, 1000.0
    job = cluster.request(cluster.stored("a", PAGES))
    assert job.result() == PAGES
    decode.settle(1)
    wait_for(lambda: cluster.wire.sent(Fail))
    wait_for(lambda: prefill.reserve.quarantined == 0)
    job.check()
    cluster.check()


def test_the_word_on_a_failed_push_does_not_free_its_slots_at_once(cluster: Cluster) -> None:
    # A frozen prefill engine finds in its kernel both the word and bytes that its transfer engine has yet to copy.
    cluster.config = msgspec.structs.replace(CONFIG, lease_s=2.0)
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", 3)
    # After its lease the word, a little later the bytes, and the slots are kept for another lease from the word on.
    decode.hop.drain_s, decode.hop.late_write_s = 2.3, 2.4
    job = cluster.request(hashes)
    assert job.result() == 3
    exposed = prefill.reserve.exposed_slots()
    assert exposed
    wait_for(lambda: cluster.wire.sent(Fail))
    wait_for(lambda: decode.hop.in_flight == 0 and len(decode.hop.written) == 3)
    assert {slot for _, slot in decode.hop.written} == exposed == prefill.reserve.exposed_slots()
    decode.settle(1)
    cluster.check()


@pytest.mark.parametrize("policy", ["split", "decode"])
def test_an_abort_at_prefill_returns_at_once_and_frees_only_what_is_safe(cluster: Cluster, policy: str) -> None:
    cluster.config = PATIENT
    cluster.storage.latency_s = 0.15
    prefill, decode = cluster.prefill(policy=policy), cluster.decode()
    decode.hop.at_push(2, decode.hop.gate.clear)
    job = cluster.request(cluster.stored("a", PAGES))
    wait_for(lambda: not decode.hop.gate.is_set())
    aborted_s = time.monotonic()
    job.abort()
    prefill.reads.gone(job.prefetch.handle)
    job.result()
    assert job.ended_s - aborted_s < AT_ONCE_S
    assert prefill.reserve.quarantined > 0
    assert prefill.pool.free_count + prefill.reserve.size == 256
    decode.hop.gate.set()
    decode.settle(1)
    assert cluster.fallbacks("prefill_read_error") == 0
    cluster.check()


@pytest.mark.parametrize("held", [0, 12])
def test_an_abort_at_decode_returns_at_once_and_its_pages_are_not_counted_on(cluster: Cluster, held: int) -> None:
    cluster.config = PATIENT
    _, decode = cluster.prefill(policy="decode"), cluster.decode()
    decode.hop.at_push(held // 3 + 1, decode.hop.gate.clear)  # the first of what it reads
    job = cluster.request(cluster.stored("a", PAGES), held=held)
    wait_for(lambda: not decode.hop.gate.is_set() and decode.jobs[1].completed)
    aborted_s = time.monotonic()
    decode.abort(1)
    # A half-done push now reads from pages that were freed and overwritten.
    theirs = decode.jobs[1]
    theirs.result()
    assert theirs.ended_s - aborted_s < AT_ONCE_S
    decode.hop.gate.set()
    assert job.result() == PAGES
    job.check()
    assert cluster.fallbacks("decode_claim_failed") == 0
    cluster.check()


def test_pages_that_an_abort_freed_do_not_count_when_their_push_ends(cluster: Cluster) -> None:
    _, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", PAGES)
    decode.hop.gate.clear()
    job = cluster.request(hashes)
    wait_for(lambda: 1 in decode.jobs and decode.jobs[1].completed)
    # The first pages are acknowledged, and half of their push is done. Nobody but SGLang knows of the abort yet.
    decode.jobs[1].abort()
    decode.hop.gate.set()
    assert job.result() == PAGES
    job.check()
    decode.reads.gone(1)
    cluster.check()


def test_aborts_on_both_sides_leak_nothing(cluster: Cluster) -> None:
    cluster.config = PATIENT
    cluster.storage.latency_s = 0.3
    prefill, decode, job = shared_read(cluster, pages=PAGES, policy="split")
    wait_for(lambda: decode.hop.pushes >= 1)
    decode.abort(1)
    job.abort()
    prefill.reads.gone(job.prefetch.handle)
    job.result(AT_ONCE_S)
    assert prefill.pool.free_count + prefill.reserve.size == 256
    wait_for(lambda: decode.pool.free_count == 256)
    assert not prefill.reads._room_of
    cluster.check()


def test_a_read_ends_at_its_deadline_with_what_it_has(cluster: Cluster) -> None:
    config = msgspec.structs.replace(CONFIG, read_deadline_s=0.6)
    prefill = cluster.prefill(config=config, readers=2)
    hashes = cluster.stored("a", PAGES)
    cluster.storage.latency_s = 0.5
    job = prefill.request(None, hashes)
    kept = job.result()
    assert job.ended_s - job.started_s < 0.6 + AT_ONCE_S
    assert kept < PAGES
    job.check()
    assert cluster.fallbacks("read_deadline") == 1
    cluster.check()


def test_a_decode_read_ends_at_its_deadline(cluster: Cluster) -> None:
    cluster.prefill(policy="decode", config=PATIENT)
    decode = cluster.decode(config=msgspec.structs.replace(PATIENT, read_deadline_s=0.6))
    hashes = cluster.stored("a", PAGES)
    cluster.storage.latency_s = 0.3
    started_s = time.monotonic()
    job = cluster.request(hashes)
    decode.settle(1)
    assert time.monotonic() - started_s < 0.6 + AT_ONCE_S
    cluster.storage.latency_s = 0.0
    assert job.result() == PAGES
    job.check()
    decode.jobs[1].check()
    assert cluster.fallbacks("read_deadline") == 1
    cluster.check()


def test_clearing_the_pools_does_not_open_a_waiting_prefetch_again(cluster: Cluster) -> None:
    prefill = cluster.prefill()
    hashes = cluster.stored("a", 10)
    cluster.storage.latency_s = 0.05
    first, second = prefill.request(None, hashes), prefill.request(None, hashes)
    prefill.reads.abandon_all()
    assert prefill.reads.opened(second.prefetch) is None
    assert first.result() < 10
    assert second.result() == 0
    cluster.check()


def test_a_read_that_ended_short_is_not_opened_again(cluster: Cluster) -> None:
    prefill = cluster.prefill()
    hashes = prompt("a", 10)
    cluster.storage.put(hashes[:4])
    job = prefill.request(None, hashes)
    assert job.result() == 4
    reads = sum(cluster.storage.reads.values())
    assert prefill.reads.opened(job.prefetch) is None
    time.sleep(0.1)
    assert sum(cluster.storage.reads.values()) == reads
    cluster.check()


def test_clearing_the_decode_pools_ends_its_reads(cluster: Cluster) -> None:
    cluster.storage.latency_s = 0.02
    _, decode, job = shared_read(cluster, pages=PAGES, held=6)
    wait_for(lambda: decode.hop.pushes >= 3)
    decode.reads.abandon_all()
    assert not decode.reads.pending(1)
    assert decode.reads.wait(decode.jobs[1].prefetch, 0, 1) == 0
    assert all(theirs.prefetch.over for theirs in decode.jobs.values())
    assert job.result() == PAGES
    job.check()
    cluster.check()


def test_a_finished_decode_prefetch_is_not_opened_again(cluster: Cluster) -> None:
    _, decode, job = shared_read(cluster, pages=PAGES)
    job.result()
    decode.settle(1)
    theirs = decode.jobs[1]
    assert theirs.read is not None
    read = decode.reads.accepted(2, object(), match_pages=0, held_slots=[], held_hashes=[])
    decode.reads.opened(read, theirs.prefetch)
    assert read.prefetch is None
    assert not decode.reads._by_prefetch
    decode.reads.gone(2)
    cluster.check()


def test_many_reads_of_many_engines_over_a_small_reserve_all_end(cluster: Cluster) -> None:
    cluster.config = PATIENT
    prefills = [cluster.prefill(f"prefill-{number}", slots=1500, reserve=7, policy="split") for number in range(2)]
    decodes = [cluster.decode(f"decode-{number}", slots=1500) for number in range(4)]
    cluster.storage.latency_s = 0.001
    jobs = []
    for room in range(40):
        hashes = prompt(f"p{room}", 30)
        cluster.storage.put(hashes)
        prefill, decode = prefills[room % 2], decodes[room % 4]
        decode.request(room, hashes, prefill.name, held=room % 5)
        jobs.append((prefill.request(room, hashes), decode, room))
    for job, decode, room in jobs:
        assert job.result(PATIENT.read_deadline_s) == 30
        job.check()
        decode.settle(room)
        if room in decode.jobs:
            decode.jobs[room].check()
    assert max(cluster.storage.reads.values()) == 1
    cluster.check()


def test_idle_pushers_end(cluster: Cluster) -> None:
    cluster.pusher_idle_s = 0.1
    _, decode, job = shared_read(cluster, pages=9)
    job.result()
    decode.settle(1)
    wait_for(lambda: not decode.carrier._pushers, within_s=2.0)
    hashes = prompt("b", 9)
    cluster.storage.put(hashes)
    decode.request(2, hashes, "prefill-1")
    again = cluster.prefills[0].request(2, hashes)
    assert again.result() == 9
    again.check()
    decode.settle(2)
    cluster.check()


def test_a_reader_thread_survives_what_it_did_not_expect(cluster: Cluster) -> None:
    prefill = cluster.prefill()
    real = prefill.reads.next_own_claim
    raised: list[bool] = []

    def broken(timeout_s: float) -> object:
        if not raised:
            raised.append(True)
            raise RuntimeError("a bug")
        return real(timeout_s)

    prefill.reads.next_own_claim = broken  # type: ignore[assignment,method-assign]
    wait_for(lambda: raised)
    hashes = cluster.stored("a", 5)
    assert prefill.request(None, hashes).result() == 5
    cluster.check()


def test_every_answered_hello_is_closed_when_the_read_ends(cluster: Cluster) -> None:
    _, decode, job = shared_read(cluster, pages=PAGES, policy="prefill")
    job.result()
    decode.settle(1, within_s=1.0)
    assert len(cluster.wire.sent(NoOffer)) == 1
    assert not cluster.wire.sent(Settled)
    assert not cluster.wire.sent(Done)
    assert not cluster.wire.sent(Cancelled)
    cluster.check()


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_an_abort_waits_for_the_storage_read_that_writes_into_its_pages(cluster: Cluster, side: str) -> None:
    _, decode = cluster.prefill(policy=side), cluster.decode()
    hashes = cluster.stored("a", 6)
    cluster.storage.gate.clear()
    job = cluster.request(hashes)
    wait_for(lambda: cluster.storage.in_flight)
    mine = job if side == "prefill" else decode.jobs[1]
    mine.abort()
    assert not mine.done.wait(0.15)
    cluster.storage.gate.set()
    mine.result()
    job.result()
    job.check()
    decode.abort(1)
    cluster.check()
