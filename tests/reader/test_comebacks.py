"""Chunks that come after their lease: who goes on with the read, who is counted on no more, what waits for nobody."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import pytest

from sglang_dualpath.errors import TransferError
from sglang_dualpath.protocol import Claim, Hello
from sglang_dualpath.reader import decode as decode_reads
from tests.reader.cluster import CONFIG, Cluster, shared_read, wait_for

BUSY_S = 3.0  # what a busy machine may add to a lease, which ends before the deadline of a read all the same


def before_decode_reads(cluster: Cluster, do: Callable[[list[str]], None]) -> None:
    """Call ``do`` with the page hashes of each storage read of a decode engine before it is done."""
    real = cluster.storage.read

    def read(wanted: list[str], pool: object, slots: object, writer: str) -> int:
        if "decode" in writer:
            do(wanted)
        return real(wanted, pool, slots, writer)  # type: ignore[arg-type]

    cluster.storage.read = read  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize("policy", ["split", "decode"])
def test_a_decode_engine_whose_lease_ran_out_comes_back(cluster: Cluster, policy: str) -> None:
    cluster.storage.latency_s = 0.03
    prefill, decode, job = shared_read(cluster, pages=120, policy=policy)
    wait_for(lambda: decode.hop.pushes >= 2)
    decode.freeze()
    cluster.storage.latency_s = 0.3  # however long the freeze takes, it leaves work for later
    wait_for(lambda: prefill.reserve.quarantined, "lease over")
    time.sleep(CONFIG.lease_s)
    before = decode.hop.pushes
    cluster.storage.latency_s = 0.03
    decode.thaw()
    assert job.result() == 120
    job.check()
    assert decode.hop.pushes > before + 3
    decode.settle(1)
    decode.jobs[1].check()
    assert cluster.fallbacks("lease_expired") >= 1
    # What was lost was read again by the prefill engine, and nothing else was.
    expired = cluster.counted('sglang_dualpath_claims_total{outcome="expired"}')
    assert sum(count - 1 for count in cluster.storage.reads.values()) <= 3 * expired
    cluster.check()


def test_a_decode_engine_keeps_what_it_read_after_its_lease(cluster: Cluster) -> None:
    # One chunk takes longer than a lease, and the read goes on behind it.
    _, decode = cluster.prefill(policy="split"), cluster.decode()
    hashes = cluster.stored("a", 90)
    cluster.storage.latency_s = 0.05
    slow: list[tuple[str, int]] = []

    def once(wanted: list[str]) -> None:
        if not slow and decode.hop.pushes:
            slow.append((wanted[0], decode.hop.pushes))
            time.sleep(2 * CONFIG.lease_s)

    before_decode_reads(cluster, once)
    job = cluster.request(hashes)
    assert job.result() == 90
    job.check()
    decode.settle(1)
    theirs = decode.jobs[1]
    theirs.check()
    [(late, pushes)] = slow
    assert cluster.storage.reads[late] == 2
    assert theirs.kept > hashes.index(late), "the late chunk was read, but not kept"
    assert decode.hop.pushes > pushes + 3
    cluster.check()


def test_a_decode_engine_that_is_always_late_ends_its_part(cluster: Cluster) -> None:
    _, decode = cluster.prefill(policy="split"), cluster.decode()
    hashes = cluster.stored("a", 200)
    cluster.storage.latency_s = 0.05
    before_decode_reads(cluster, lambda wanted: time.sleep(1.2 * CONFIG.lease_s))
    job = cluster.request(hashes)
    assert job.result() == 200
    job.check()
    decode.settle(1)
    assert cluster.counted('sglang_dualpath_claims_total{outcome="refused_unknown_reader"}') >= 1
    cluster.check()


@pytest.fixture
def no_push_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a push outlasts its lease: a busy machine is not to decide which of two faults comes first."""
    monkeypatch.setattr(decode_reads, "_HANGING", 1000.0)


@pytest.mark.usefixtures("no_push_hangs")
def test_an_engine_that_is_always_late_by_its_own_clock_ends_its_part(cluster: Cluster) -> None:
    # Its lease is shorter than the prefill engine's, which never sees one run out.
    cluster.prefill(policy="decode", config=msgspec.structs.replace(CONFIG, lease_s=3.0))
    decode = cluster.decode()
    hashes = cluster.stored("a", 60)
    decode.hop.latency_s = 1.03 * CONFIG.lease_s
    job = cluster.request(hashes)
    assert job.result() == 60
    job.check()
    decode.settle(1)
    assert cluster.fallbacks("lease_expired") == 0
    reasons = ("lease_over_pushing", "lease_over_unpushed", "lease_over_unread")
    assert 8 < sum(cluster.fallbacks(reason) for reason in reasons) < 16
    cluster.check()


def test_a_hanging_push_does_not_hold_up_the_request_on_its_own_server(cluster: Cluster) -> None:
    cluster.storage.latency_s = 0.1  # the prefill engine has more to read, however late this looks
    _, decode = cluster.prefill(policy="split"), cluster.decode()
    decode.hop.at_push(2, decode.hop.gate.clear)
    job = cluster.request(cluster.stored("a", 200))
    wait_for(lambda: not decode.hop.gate.is_set())
    decode.settle(1, within_s=CONFIG.lease_s + BUSY_S)
    assert cluster.fallbacks("push_hangs") == 1
    assert not job.done.is_set(), "the prefill engine should have had more to read"
    cluster.storage.latency_s = 0.0
    decode.hop.gate.set()
    assert job.result() == 200
    job.check()
    cluster.check()


def test_a_hanging_push_does_not_hold_up_other_requests(cluster: Cluster) -> None:
    # All claims that may be open to one prefill engine wait behind it.
    prefill, decode = cluster.prefill(), cluster.decode()
    prompts = [cluster.stored(f"p{room}", 40) for room in (1, 2)]
    cluster.storage.latency_s = 0.01
    decode.hop.gate.clear()
    for room, hashes in enumerate(prompts, 1):
        decode.request(room, hashes, prefill.name)
    wait_for(lambda: len(cluster.wire.sent(Hello)) == 2)
    jobs = [prefill.request(room, hashes) for room, hashes in enumerate(prompts, 1)]
    for room in (1, 2):
        decode.settle(room, within_s=2 * CONFIG.lease_s + BUSY_S)
    decode.hop.gate.set()
    for job in jobs:
        assert job.result() == 40
        job.check()
    cluster.check()


def test_nothing_is_claimed_where_a_push_still_hangs_that_has_failed(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(), cluster.decode()
    prompts = [cluster.stored(f"p{room}", 40) for room in (1, 2, 3)]
    cluster.storage.latency_s = 0.01
    ended: list[bool] = []

    def hang(session: str) -> None:
        raise TransferError(f"not ended a push to {session} in 30 s", over=lambda: bool(ended))

    decode.hop.fault = hang

    def answered(room: int) -> None:
        decode.request(room, prompts[room - 1], prefill.name)
        wait_for(lambda: len(cluster.wire.sent(Hello)) == room)
        job = prefill.request(room, prompts[room - 1])
        assert job.result() == 40
        job.check()
        decode.settle(room)

    answered(1)
    pushed = decode.hop.pushes
    answered(2)
    assert decode.hop.pushes == pushed
    assert cluster.fallbacks("push_hangs") == 1
    assert not [claim for claim in cluster.wire.sent(Claim) if claim.room == 2]
    decode.hop.fault = lambda session: None
    ended.append(True)
    wait_for(lambda: prefill.reserve.quarantined == 0)
    answered(3)
    assert decode.hop.pushes > pushed
    cluster.check()


@pytest.mark.usefixtures("no_push_hangs")
def test_a_push_that_fails_after_its_lease_ends_the_part_of_the_decode_engine(cluster: Cluster) -> None:
    def fail(session: str) -> None:
        time.sleep(1.1 * CONFIG.lease_s)
        raise TransferError("link down")

    cluster.storage.latency_s = 0.04
    prefill, decode = cluster.prefill(), cluster.decode()
    decode.hop.fault = fail
    decode.hop.drain_s = 5.0
    hashes = cluster.stored("a", 200)
    read = decode.request(1, hashes, prefill.name)
    wait_for(lambda: cluster.wire.sent(Hello))
    job = prefill.request(1, hashes)
    wait_for(lambda: cluster.fallbacks("push_failed") == 1)
    with decode.reads.lock:  # counted under it, before the read is ended
        assert read.ended == "push_failed"
    decode.hop.fault = lambda session: None
    assert job.result() == 200
    job.check()
    decode.settle(1)
    wait_for(lambda: not decode.reads.draining, "last words said")
    cluster.check()
