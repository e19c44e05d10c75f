"""Engines that freeze, fall silent or die: nobody waits longer than a lease, and no slot in use is written late."""

from __future__ import annotations

import time

import msgspec

from sglang_dualpath.protocol import Done, Grant, Hello, Message
from tests.reader.cluster import CONFIG, PATIENT, Cluster, prompt, shared_read, wait_for

PAGES = 40
# What takes a lease ends within this on a busy machine, and before a deadline or a push that hangs.
LEASE_S = CONFIG.lease_s + 3.5
# Of an engine that would wait longer than that for a word of its peer, were it not for the lease.
BY_LEASE_ALONE = msgspec.structs.replace(CONFIG, hello_silence_s=2 * LEASE_S)


def test_a_late_write_lands_in_quarantined_slots_only(cluster: Cluster) -> None:
    cluster.storage.latency_s = 0.02
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    decode.hop.at_push(2, decode.freeze)
    job = cluster.request(cluster.stored("a", PAGES))
    wait_for(lambda: not decode.hop.gate.is_set())
    frozen_s = time.monotonic()
    # The own reader brings what the frozen engine had claimed, one lease later.
    assert job.result() == PAGES
    assert job.ended_s - frozen_s < LEASE_S
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
    prefill, decode, job = shared_read(cluster, pages=PAGES)
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
    hashes = cluster.stored("a", PAGES)
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
    prefill, decode, job = shared_read(cluster, pages=PAGES)
    wait_for(lambda: decode.hop.pushes >= 1)
    decode.freeze()
    wait_for(lambda: prefill.reserve.quarantined, "lease over")
    decode.kill()
    wait_for(lambda: prefill.reserve.quarantined == 0)
    assert job.result() == PAGES
    job.check()
    cluster.check()


def test_a_decode_engine_killed_with_open_claims_is_replaced_at_once(cluster: Cluster) -> None:
    cluster.config = PATIENT
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    decode.hop.gate.clear()
    job = cluster.request(cluster.stored("a", PAGES))
    wait_for(lambda: decode.hop.in_flight and prefill.reserve.backing)
    decode.kill()
    killed_s = time.monotonic()
    assert job.result() == PAGES
    assert job.ended_s - killed_s < PATIENT.lease_s / 2
    job.check()
    assert cluster.fallbacks("decode_gone") == 1
    cluster.check()


def test_a_frozen_decode_engine_that_alone_holds_pages_costs_at_most_a_lease(cluster: Cluster) -> None:
    # The offer reaches an engine that never asks for anything.
    prefill, decode = cluster.prefill(config=BY_LEASE_ALONE), cluster.decode()
    hashes = cluster.stored("a", 24)
    decode.request(1, hashes, prefill.name, held=24)
    wait_for(lambda: cluster.wire.sent(Hello))
    wait_for(lambda: prefill.reads.rooms.get(1) is not None)
    decode.freeze()
    job, other = prefill.request(1, hashes, stored=10), prefill.request(2, prompt("a", 10))
    assert job.result() == 10
    assert job.ended_s - job.started_s < LEASE_S
    job.check()
    assert other.result() == 10
    assert other.ended_s - other.started_s < LEASE_S
    assert cluster.fallbacks("decode_silent") == 1
    decode.thaw()
    decode.settle(1)
    cluster.check()


def test_the_decode_policy_does_not_wait_for_a_frozen_engine(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="decode", config=BY_LEASE_ALONE), cluster.decode()
    hashes = cluster.stored("a", 24)
    decode.request(1, hashes, prefill.name)
    wait_for(lambda: prefill.reads.rooms.get(1) is not None)
    decode.freeze()
    job = prefill.request(1, hashes)
    assert job.result() == 24
    assert job.ended_s - job.started_s < LEASE_S
    decode.thaw()
    decode.settle(1)
    cluster.check()


def test_a_frozen_prefill_engine_delays_reads_of_others_by_a_lease_at_most(cluster: Cluster) -> None:
    frozen, well = (cluster.prefill(f"prefill-{number}", policy="decode") for number in (1, 2))
    # Long before it takes the frozen one for dead.
    decode = cluster.decode(config=BY_LEASE_ALONE)
    hashes = cluster.stored("a", 20)
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
    assert job.ended_s - job.started_s < LEASE_S
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
    hashes = cluster.stored("a", 30)

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
    assert job.ended_s - job.started_s < LEASE_S
    job.check()
    # The decode engine's own prefixes are not held up by the hanging push for longer than its lease, either.
    decode.settle(10)
    hanging.set()
    for one in jobs:
        assert one.result() == 30
        one.check()
    cluster.check()


def test_clearing_the_pools_keeps_exposed_slots_out(cluster: Cluster) -> None:
    cluster.config = PATIENT
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    decode.hop.at_push(1, decode.freeze)
    job = cluster.request(cluster.stored("a", PAGES))
    wait_for(lambda: not decode.hop.gate.is_set() and prefill.reserve.backing)
    prefill.reads.abandon_all()
    job.result(PATIENT.lease_s / 2)
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


def test_pages_taken_back_are_claimed_by_another_reader(cluster: Cluster) -> None:
    cluster.storage.latency_s = 0.01
    _, decode, job = shared_read(cluster, pages=PAGES, policy="decode")
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
    prefill, decode, job = shared_read(cluster, pages=PAGES)
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


def test_a_push_that_outlives_its_lease_here_does_not_count_there(cluster: Cluster) -> None:
    # As if the prefill engine's clock had stood still: its lease goes on while this engine's pages are reused.
    cluster.prefill(policy="decode", config=msgspec.structs.replace(CONFIG, lease_s=3.0))
    decode = cluster.decode()
    hashes = cluster.stored("a", 6)
    decode.hop.gate.clear()
    job = cluster.request(hashes)
    wait_for(lambda: decode.hop.in_flight)
    wait_for(lambda: 1 in decode.jobs and decode.jobs[1].done.is_set())
    theirs = decode.jobs[1]
    theirs.check()
    decode.pool.free(theirs.slots()[: theirs.kept])
    theirs.kept = 0
    decode.hop.gate.set()
    assert job.result() == 6
    job.check()
    assert not cluster.wire.sent(Done)
    cluster.check()


def test_a_landing_after_the_lease_does_not_count_even_before_a_tick(cluster: Cluster) -> None:
    config = msgspec.structs.replace(PATIENT, lease_s=3.0)
    prefill, decode = cluster.prefill(policy="decode", config=config), cluster.decode(config=config)
    hashes = cluster.stored("a", 3)
    decode.request(1, hashes, prefill.name)
    wait_for(lambda: cluster.wire.sent(Hello))
    tick = cluster.wire._ticks.pop(prefill.name)

    def slow_down(sender: str, receiver: str, message: Message) -> bool:
        if isinstance(message, Grant):
            cluster.wire.delay_s = 1.6  # twice that is more than a lease
        return False

    # In its lease where it was pushed, past it where it was granted.
    cluster.wire.lose = slow_down
    job = prefill.request(1, hashes)
    wait_for(lambda: cluster.wire.sent(Done))
    assert job.result() == 3
    job.check()
    cluster.wire.delay_s = 0.0
    assert cluster.counted('sglang_dualpath_claims_total{outcome="expired"}') == 1
    assert cluster.counted("sglang_dualpath_received_bytes_total") == 0
    cluster.wire._ticks[prefill.name] = tick
    decode.settle(1)
    cluster.check()
