"""A read limit slows storage reads down, and nothing else waits for it."""

from __future__ import annotations

import time

import msgspec
import pytest

from tests.reader.cluster import PAGE_BYTES, PATIENT, Cluster, DecodeEngine, Job, wait_for

# Leases that last while a test waits for what must not take as long.
STILL = msgspec.structs.replace(PATIENT, read_rate_limit_bytes_per_s=1, lease_s=30.0)


def whole_on_both_sides(cluster: Cluster, job: Job, decode: DecodeEngine) -> None:
    """The prefill engine gets every page, and the decode engine keeps what it read, which is all."""
    pages = len(job.hashes)
    assert job.result() == pages
    job.check()
    decode.settle(1)
    assert decode.jobs[1].kept == pages


def pushed_pages(cluster: Cluster) -> float:
    return cluster.counted('sglang_dualpath_pushed_bytes_total{engine_role="decode"}') / PAGE_BYTES


@pytest.mark.parametrize("end", ["abort", "flush"])
def test_the_end_of_a_prefill_read_does_not_wait_for_the_limit(cluster: Cluster, end: str) -> None:
    prefill = cluster.prefill(config=STILL)
    hashes = cluster.stored("a", 12)
    job = prefill.request(None, hashes)
    # The first chunk is free, and the next one will come in minutes.
    wait_for(lambda: len(cluster.storage.reads) == 3)
    time.sleep(0.05)
    if end == "abort":
        job.abort()
    else:
        prefill.reads.abandon_all()
    assert job.result() <= 3
    assert len(cluster.storage.reads) == 3
    cluster.check()


def test_what_waits_for_the_limit_of_prefill_can_be_claimed_by_decode(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="split", config=STILL), cluster.decode(config=PATIENT)
    assert prefill.request(None, cluster.stored("first", 3)).result() == 3
    whole_on_both_sides(cluster, cluster.request(cluster.stored("a", 12)), decode)
    cluster.check()


def test_the_end_of_a_decode_read_does_not_wait_for_the_limit(cluster: Cluster) -> None:
    cluster.prefill(policy="decode", config=STILL)
    decode = cluster.decode(config=STILL)
    hashes = cluster.stored("a", 12)
    job = cluster.request(hashes)
    wait_for(lambda: pushed_pages(cluster) == 1)
    wait_for(lambda: decode.reads.reads[1].granted)
    decode.abort(1)
    theirs = decode.jobs[1]
    theirs.result()
    assert theirs.prefetch.over
    job.abort()
    job.result()
    cluster.check()


def test_pages_in_memory_do_not_wait_for_the_limit(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="decode", config=STILL), cluster.decode(config=STILL)
    first = cluster.stored("first", 1)
    decode.request(2, first, prefill.name)
    assert prefill.request(2, first).result() == 1
    hashes = cluster.stored("a", 20)
    job = cluster.request(hashes, held=12)
    wait_for(lambda: pushed_pages(cluster) == 1 + 12)
    wait_for(lambda: decode.reads.reads[1].granted)
    assert list(cluster.storage.reads) == first
    decode.abort(1)
    job.abort()
    job.result()
    cluster.check()


def test_leases_outlast_the_limit(cluster: Cluster) -> None:
    # A whole chunk would take longer than a lease: 24 pages of 64 bytes are 3.84 s.
    config = msgspec.structs.replace(PATIENT, chunk_bytes=24 * PAGE_BYTES, lease_s=3.0, read_rate_limit_bytes_per_s=400)
    cluster.prefill(policy="decode", config=config, reserve=64)
    decode = cluster.decode(config=config)
    whole_on_both_sides(cluster, cluster.request(cluster.stored("a", 30)), decode)
    assert cluster.fallbacks("lease_expired") == cluster.fallbacks("lease_over_unread") == 0
    cluster.check()
