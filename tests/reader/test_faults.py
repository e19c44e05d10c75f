"""Freezes, deaths, aborts and errors on either side: reads end in time, bytes are right, and no slot is written late."""

from __future__ import annotations

import time

import msgspec
import pytest

from sglang_dualpath.errors import TransferError
from sglang_dualpath.protocol import Cancelled, Done, Fail, Grant, Hello, NoOffer, Settled
from tests.reader.cluster import CONFIG, Cluster, DecodeEngine, Job, PrefillEngine, prompt, wait_for

PAGES = 40


def shared_read(
    cluster: Cluster, *, policy: str = "decode", pages: int = PAGES, held: int = 0, stored: int | None = None
) -> tuple[PrefillEngine, DecodeEngine, Job]:
    """One request that a decode engine has asked about before it reached prefill."""
    prefill, decode = cluster.prefill(policy=policy), cluster.decode()
    hashes = prompt("a", pages)
    cluster.storage.put(hashes[:stored])
    decode.request(1, hashes, prefill.name, held=held)
    wait_for(lambda: cluster.wire.sent(Hello))
    return prefill, decode, prefill.request(1, hashes, stored=stored)


def test_a_late_write_lands_in_quarantined_slots_only(cluster: Cluster) -> None:
    cluster.storage.latency_s = 0.02
    prefill, decode, job = shared_read(cluster)
    wait_for(lambda: decode.hop.pushes >= 2)
    decode.freeze()
    wait_for(lambda: decode.hop.in_flight)
    frozen_s = time.monotonic()
    # The own reader brings what the frozen engine had claimed, one lease later.
    assert job.result() == PAGES
    assert job.ended_s - frozen_s < CONFIG.lease_s + 1.0
    job.check()
    assert prefill.reserve.quarantined > 0
    exposed = prefill.reserve.exposed_slots()
    assert not exposed & set(job.slots())
    written = set(decode.hop.written)
    decode.thaw()
    wait_for(lambda: not decode.hop.in_flight)
    late = {slot for session, slot in decode.hop.written - written if session == prefill.name}
    assert late <= exposed
    job.check()
    wait_for(lambda: prefill.reserve.quarantined == 0, "reserve released")
    decode.settle(1)
    assert cluster.fallbacks("lease_expired") >= 1
    cluster.check()


def test_quarantine_lasts_until_the_last_word(cluster: Cluster) -> None:
    prefill, decode, job = shared_read(cluster)
    decode.hop.gate.clear()
    job.result()
    job.check()
    quarantined = prefill.reserve.quarantined
    assert quarantined > 0
    time.sleep(2 * CONFIG.lease_s)
    assert prefill.reserve.quarantined == quarantined
    decode.hop.gate.set()
    wait_for(lambda: prefill.reserve.quarantined == 0)
    cluster.check()


def test_a_decode_engine_stuck_in_a_storage_read_costs_a_lease(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = prompt("a", PAGES)
    cluster.storage.put(hashes)
    real = cluster.storage.read

    def read(hashes: list[str], pool: object, slots: object, writer: str) -> int:
        if "decode" in writer:
            cluster.storage.gate.wait(30)
        return real(hashes, pool, slots, writer)  # type: ignore[arg-type]

    cluster.storage.read = read  # type: ignore[assignment,method-assign]
    decode.request(1, hashes, prefill.name)
    wait_for(lambda: cluster.wire.sent(Hello))
    cluster.storage.gate = type(cluster.storage.gate)()
    job = prefill.request(1, hashes)
    wait_for(lambda: prefill.reserve.quarantined)
    cluster.storage.gate.set()
    assert job.result() == PAGES
    job.check()
    decode.settle(1)
    decode.jobs[1].check()
    cluster.check()


def test_a_killed_decode_engine_releases_its_quarantine(cluster: Cluster) -> None:
    cluster.storage.latency_s = 0.01
    prefill, decode, job = shared_read(cluster)
    wait_for(lambda: decode.hop.pushes >= 1)
    decode.freeze()
    wait_for(lambda: prefill.reserve.quarantined, "lease over")
    decode.kill()
    wait_for(lambda: prefill.reserve.quarantined == 0)
    assert job.result() == PAGES
    job.check()
    cluster.check()


def test_a_decode_engine_killed_with_open_claims_is_replaced_at_once(cluster: Cluster) -> None:
    cluster.storage.latency_s = 0.01
    prefill, decode, job = shared_read(cluster)
    decode.hop.gate.clear()
    wait_for(lambda: decode.hop.in_flight and prefill.reserve.backing)
    decode.kill()
    killed_s = time.monotonic()
    assert job.result() == PAGES
    assert job.ended_s - killed_s < CONFIG.lease_s + 1.0
    job.check()
    assert cluster.fallbacks("decode_gone") == 1
    cluster.check()


def test_a_frozen_decode_engine_that_alone_holds_pages_costs_at_most_a_lease(cluster: Cluster) -> None:
    # The offer reaches an engine that never asks for anything.
    prefill, decode = cluster.prefill(), cluster.decode()
    hashes = prompt("a", 24)
    cluster.storage.put(hashes)
    decode.request(1, hashes, prefill.name, held=24)
    wait_for(lambda: cluster.wire.sent(Hello))
    wait_for(lambda: prefill.reads.rooms.get(1) is not None)
    decode.freeze()
    job, other = prefill.request(1, hashes, stored=10), prefill.request(2, prompt("a", 10))
    assert job.result() == 10
    assert job.ended_s - job.started_s < 2 * CONFIG.lease_s + 0.5
    job.check()
    assert other.result() == 10
    assert other.ended_s - other.started_s < 2 * CONFIG.lease_s + 0.6
    assert cluster.fallbacks("decode_silent") == 1
    decode.thaw()
    decode.settle(1)
    cluster.check()


def test_the_decode_policy_does_not_wait_for_a_frozen_engine(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = prompt("a", 24)
    cluster.storage.put(hashes)
    decode.request(1, hashes, prefill.name)
    wait_for(lambda: prefill.reads.rooms.get(1) is not None)
    decode.freeze()
    job = prefill.request(1, hashes)
    assert job.result() == 24
    assert job.ended_s - job.started_s < 2 * CONFIG.lease_s + 0.5
    decode.thaw()
    decode.settle(1)
    cluster.check()


def test_a_frozen_prefill_engine_delays_reads_of_others_by_a_lease_at_most(cluster: Cluster) -> None:
    frozen, well = (cluster.prefill(f"prefill-{number}", policy="decode") for number in (1, 2))
    decode = cluster.decode()
    hashes = prompt("a", 20)
    cluster.storage.put(hashes)
    for room in range(1, 7):
        decode.request(room, hashes, frozen.name)
    wait_for(lambda: len(cluster.wire.sent(Hello)) == 6)
    cluster.wire.delay_s = 0.02
    jobs = [frozen.request(room, hashes, stored=20) for room in range(1, 7)]
    wait_for(lambda: cluster.wire.sent(Grant))
    cluster.wire.freeze(frozen.name)
    decode.request(10, hashes, well.name)
    job = well.request(10, hashes)
    assert job.result() == 20
    assert job.ended_s - job.started_s < CONFIG.lease_s + 0.7
    job.check()
    cluster.wire.thaw(frozen.name)
    for one in jobs:
        assert one.result() == 20
        one.check()
    for room in (*range(1, 7), 10):
        decode.settle(room)
    cluster.check()


def test_a_push_that_hangs_does_not_stop_reads_of_other_prefill_engines(cluster: Cluster) -> None:
    stuck, well, decode = cluster.prefill("prefill-1"), cluster.prefill("prefill-2", policy="decode"), cluster.decode()
    hashes = prompt("a", 30)
    cluster.storage.put(hashes)

    def hang(session: str) -> None:
        if session == stuck.name:
            decode.hop.gate.clear()
            decode.hop.gate.wait(30)

    decode.hop.fault = hang
    for room in (1, 2, 3):
        decode.request(room, hashes, stuck.name)
    wait_for(lambda: len(cluster.wire.sent(Hello)) == 3)
    cluster.storage.latency_s = 0.005
    jobs = [stuck.request(room, hashes) for room in (1, 2, 3)]
    wait_for(lambda: decode.hop.in_flight)
    hanging = decode.hop.gate
    decode.hop.gate = type(hanging)()
    decode.hop.gate.set()
    decode.hop.fault = lambda session: hanging.wait(30) and None if session == stuck.name else None
    decode.request(10, hashes, well.name)
    job = well.request(10, hashes)
    assert job.result() == 30
    assert job.ended_s - job.started_s < CONFIG.lease_s + 0.7
    job.check()
    # The decode engine's own prefixes are not held up by the hanging push for longer than its lease, either.
    decode.settle(10)
    hanging.set()
    for one in jobs:
        assert one.result() == 30
        one.check()
    cluster.check()


@pytest.mark.parametrize("policy", ["decode", "split"])
def test_a_storage_error_at_decode_is_made_good_by_prefill(cluster: Cluster, policy: str) -> None:
    cluster.storage.latency_s = 0.005
    failed: list[str] = []

    def fail_once(hashes: object) -> None:
        if not failed and cluster.wire.sent(Grant):
            failed.append("x")
            raise OSError("storage is gone")

    cluster.storage.fault = fail_once
    _, decode, job = shared_read(cluster, policy=policy)
    assert job.result() == PAGES
    job.check()
    decode.settle(1)
    decode.jobs[1].check()
    assert failed
    cluster.check()


def test_a_storage_error_at_prefill_is_made_good_by_decode(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="split"), cluster.decode()
    hashes = prompt("a", PAGES)
    cluster.storage.put(hashes)
    cluster.storage.latency_s = 0.005
    real = cluster.storage.read

    def read(hashes: list[str], pool: object, slots: object, writer: str) -> int:
        if "prefill" in writer:
            raise OSError("no route to storage")
        return real(hashes, pool, slots, writer)  # type: ignore[arg-type]

    cluster.storage.read = read  # type: ignore[assignment,method-assign]
    decode.request(1, hashes, prefill.name)
    wait_for(lambda: cluster.wire.sent(Hello))
    job = prefill.request(1, hashes)
    # What both could not bring is the end of what is kept; nothing before it is lost.
    job.result()
    job.check()
    decode.settle(1)
    assert cluster.fallbacks("prefill_read_error") >= 1
    cluster.check()


def test_a_page_that_nobody_finds_ends_the_read_before_it(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="split"), cluster.decode()
    hashes = prompt("a", PAGES)
    cluster.storage.put(hashes)
    del cluster.storage.pages[hashes[21]]
    decode.request(1, hashes, prefill.name)
    wait_for(lambda: cluster.wire.sent(Hello))
    job = prefill.request(1, hashes)
    assert job.result() == 21
    job.check()
    decode.settle(1)
    assert decode.jobs[1].kept <= 21
    decode.jobs[1].check()
    cluster.check()


def test_a_push_that_fails_is_read_by_prefill(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = prompt("a", PAGES)
    cluster.storage.put(hashes)

    def refuse(session: str) -> None:
        raise TransferError("link down")

    decode.hop.fault = refuse
    decode.request(1, hashes, prefill.name)
    wait_for(lambda: cluster.wire.sent(Hello))
    job = prefill.request(1, hashes)
    assert job.result() == PAGES
    job.check()
    decode.settle(1)
    decode.jobs[1].check()
    assert cluster.fallbacks("push_failed") >= 1
    cluster.check()


def test_a_failed_push_whose_bytes_come_later_harms_nobody(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = prompt("a", PAGES)
    cluster.storage.put(hashes)
    decode.hop.late_write_s, decode.hop.drain_s = 0.8, 1.2
    decode.request(1, hashes, prefill.name)
    wait_for(lambda: cluster.wire.sent(Hello))
    job = prefill.request(1, hashes)
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


@pytest.mark.parametrize("policy", ["split", "decode"])
def test_an_abort_at_prefill_returns_at_once_and_frees_only_what_is_safe(cluster: Cluster, policy: str) -> None:
    cluster.storage.latency_s = 0.03
    prefill, decode, job = shared_read(cluster, policy=policy)
    wait_for(lambda: decode.hop.pushes >= 2)
    decode.hop.gate.clear()
    wait_for(lambda: decode.hop.in_flight)
    aborted_s = time.monotonic()
    job.abort()
    prefill.reads.gone(job.prefetch.handle)
    job.result()
    assert job.ended_s - aborted_s < 1.0
    assert prefill.reserve.quarantined > 0
    assert prefill.pool.free_count + prefill.reserve.size == 256
    decode.hop.gate.set()
    decode.settle(1)
    assert cluster.fallbacks("prefill_read_error") == 0
    cluster.check()


@pytest.mark.parametrize("held", [0, 12])
def test_an_abort_at_decode_returns_at_once_and_its_pages_are_not_counted_on(cluster: Cluster, held: int) -> None:
    cluster.storage.latency_s = 0.03
    _, decode, job = shared_read(cluster, held=held)
    wait_for(lambda: decode.jobs.get(1) is not None and decode.jobs[1].completed)
    decode.hop.gate.clear()
    wait_for(lambda: decode.hop.in_flight)
    aborted_s = time.monotonic()
    decode.abort(1)
    # A half-done push now reads from pages that were freed and overwritten.
    theirs = decode.jobs[1]
    theirs.result()
    assert theirs.ended_s - aborted_s < 1.0
    decode.hop.gate.set()
    assert job.result() == PAGES
    job.check()
    assert cluster.fallbacks("decode_claim_failed") == 0
    cluster.check()


def test_aborts_on_both_sides_leak_nothing(cluster: Cluster) -> None:
    cluster.storage.latency_s = 0.02
    prefill, decode, job = shared_read(cluster, policy="split")
    wait_for(lambda: decode.hop.pushes >= 1)
    decode.abort(1)
    job.abort()
    prefill.reads.gone(job.prefetch.handle)
    job.result(1.0)
    assert prefill.pool.free_count + prefill.reserve.size == 256
    wait_for(lambda: decode.pool.free_count == 256)
    assert not prefill.reads._room_of
    cluster.check()


def test_a_read_ends_at_its_deadline_with_what_it_has(cluster: Cluster) -> None:
    config = msgspec.structs.replace(CONFIG, read_deadline_s=0.6)
    prefill = cluster.prefill(config=config, readers=2)
    hashes = prompt("a", PAGES)
    cluster.storage.put(hashes)
    cluster.storage.latency_s = 0.2
    job = prefill.request(None, hashes)
    kept = job.result()
    assert job.ended_s - job.started_s < 1.5
    assert kept < PAGES
    job.check()
    assert cluster.fallbacks("read_deadline") == 1
    cluster.check()


def test_a_decode_read_ends_at_its_deadline(cluster: Cluster) -> None:
    prefill = cluster.prefill(policy="decode")
    decode = cluster.decode(config=msgspec.structs.replace(CONFIG, read_deadline_s=0.6))
    hashes = prompt("a", PAGES)
    cluster.storage.put(hashes)
    cluster.storage.latency_s = 0.1
    started_s = time.monotonic()
    decode.request(1, hashes, prefill.name)
    wait_for(lambda: cluster.wire.sent(Hello))
    job = prefill.request(1, hashes)
    decode.settle(1)
    assert time.monotonic() - started_s < 1.5
    assert job.result() == PAGES
    job.check()
    decode.jobs[1].check()
    assert cluster.fallbacks("read_deadline") == 1
    cluster.check()


def test_clearing_the_pools_keeps_exposed_slots_out(cluster: Cluster) -> None:
    cluster.storage.latency_s = 0.01
    prefill, decode, job = shared_read(cluster)
    wait_for(lambda: decode.hop.pushes >= 1)
    decode.freeze()
    wait_for(lambda: decode.hop.in_flight and prefill.reserve.backing)
    prefill.reads.abandon_all()
    job.result(1.0)
    exposed = prefill.reserve.exposed_slots()
    assert exposed
    assert not prefill.reads.rooms
    # What SGLang's pool does on clear(), and what takes the reserve again afterwards.
    with prefill.reads.lock, prefill.pool.lock:
        everything = set(range(256)) - exposed
        prefill.pool._free[:] = sorted(everything)
        prefill.pool._sealed.clear()
        prefill.reserve.reseat(prefill.pool.alloc(prefill.reserve.size - len(exposed)))
    decode.thaw()
    hashes = prompt("b", PAGES)
    cluster.storage.put(hashes)
    again = prefill.request(2, hashes)
    decode.request(2, hashes, prefill.name)
    assert again.result() == PAGES
    again.check()
    decode.settle(1)
    decode.settle(2)
    cluster.check()


def test_clearing_the_pools_does_not_open_a_waiting_prefetch_again(cluster: Cluster) -> None:
    prefill = cluster.prefill()
    hashes = prompt("a", 10)
    cluster.storage.put(hashes)
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
    _, decode, job = shared_read(cluster, held=6)
    wait_for(lambda: decode.hop.pushes >= 3)
    decode.reads.abandon_all()
    assert not decode.reads.pending(1)
    assert job.result() == PAGES
    job.check()
    cluster.check()


def test_a_finished_decode_prefetch_is_not_opened_again(cluster: Cluster) -> None:
    _, decode, job = shared_read(cluster)
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
        assert job.result() == 30
        job.check()
        decode.settle(room)
        if room in decode.jobs:
            decode.jobs[room].check()
    assert max(cluster.storage.reads.values()) == 1
    cluster.check()


def test_pages_taken_back_are_claimed_by_another_reader(cluster: Cluster) -> None:
    cluster.storage.latency_s = 0.01
    prefill, decode, job = shared_read(cluster, policy="decode")
    wait_for(lambda: decode.hop.pushes >= 1)
    decode.hop.gate.clear()
    assert job.result() == PAGES
    job.check()
    statistics = cluster.counted('sglang_dualpath_claims_total{outcome="expired"}')
    assert statistics >= 1
    # A page is read twice only if its claim was taken back.
    twice = [page for page, count in cluster.storage.reads.items() if count > 1]
    assert len(twice) <= 3 * statistics
    assert max(cluster.storage.reads.values()) <= 2
    decode.hop.gate.set()
    decode.settle(1)
    cluster.check()


def test_a_prefill_engine_that_falls_silent_lets_decode_requests_go_on(cluster: Cluster) -> None:
    cluster.storage.latency_s = 0.02
    silent: list[str] = []
    prefill, decode, job = shared_read(cluster)
    decode.reads.on_silence = silent.append
    wait_for(lambda: decode.hop.pushes >= 2)
    cluster.wire.freeze(prefill.name)
    decode.settle(1, within_s=CONFIG.hello_silence_s + 2.0)
    assert silent == [prefill.name]
    assert cluster.fallbacks("prefill_silent") == 1
    cluster.wire.thaw(prefill.name)
    assert job.result() == PAGES
    job.check()
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
    hashes = prompt("a", 5)
    cluster.storage.put(hashes)
    assert prefill.request(None, hashes).result() == 5
    cluster.check()


def test_every_answered_hello_is_closed_when_the_read_ends(cluster: Cluster) -> None:
    _, decode, job = shared_read(cluster, policy="prefill")
    job.result()
    decode.settle(1, within_s=1.0)
    assert len(cluster.wire.sent(NoOffer)) == 1
    assert not cluster.wire.sent(Settled)
    assert not cluster.wire.sent(Done)
    assert not cluster.wire.sent(Cancelled)
    cluster.check()
