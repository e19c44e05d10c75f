"""Everything at once, by a seed: slow and broken storage, lost messages, freezes, failed pushes, aborts and a death."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence

import pytest

from sglang_dualpath.errors import TransferError
from tests.reader.cluster import CONFIG, Cluster, DecodeEngine, Job, PrefillEngine, prompt, shared_read

REQUESTS = 70
PAGES = 32


class Weather:
    """Faults at random until ``clear``."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._foul = True
        cluster.wire.delay_s = 0.001
        cluster.wire.jitter_s = 0.004
        cluster.wire.lose = lambda sender, receiver, message: self._chance(0.02)
        cluster.wire.double = lambda message: self._chance(0.02)
        cluster.storage.latency_s = 0.002
        cluster.storage.fault = self._storage
        self._thread = threading.Thread(target=self._freeze_and_thaw, daemon=True)
        self._thread.start()

    def _chance(self, share: float) -> bool:
        with self._lock:
            return self._foul and self._random.random() < share

    def _storage(self, hashes: Sequence[str]) -> None:
        if self._chance(0.03):
            raise OSError("storage error")
        if self._chance(0.03):
            time.sleep(0.1)

    def hop(self, session: str) -> None:
        if self._chance(0.03):
            raise TransferError("push failed")
        if self._chance(0.05):
            time.sleep(0.05)

    def _freeze_and_thaw(self) -> None:
        while self._foul:
            time.sleep(0.1)
            living = [decode for decode in self._cluster.decodes if not decode.hop.dead]
            if living and self._chance(0.5):
                decode = self._random.choice(living)
                decode.freeze()
                time.sleep(self._random.uniform(0.05, 0.9))
                if not decode.hop.dead:
                    decode.thaw()

    def clear(self) -> None:
        self._foul = False
        self._thread.join(5)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_reads_end_in_time_and_whole_whatever_goes_wrong(cluster: Cluster, seed: int) -> None:
    chance = random.Random(seed)
    prefills = [
        cluster.prefill("prefill-1", slots=3000, reserve=40, policy="split", readers=2),
        cluster.prefill("prefill-2", slots=3000, reserve=9, policy="decode"),
    ]
    decodes = [cluster.decode(f"decode-{number}", slots=3000, readers=1 + number % 2) for number in range(3)]
    weather = Weather(cluster, seed)
    for number, decode in enumerate(decodes):
        decode.hop.fault = weather.hop
        if number == 1:
            decode.hop.drain_s = 0.3
    requests: list[tuple[PrefillEngine, DecodeEngine, Job, int, int]] = []
    for room in range(REQUESTS):
        hashes = prompt(f"p{room}", PAGES)
        stored = chance.choice([PAGES, PAGES, PAGES - 5])
        cluster.storage.put(hashes[:stored])
        if chance.random() < 0.05:
            del cluster.storage.pages[hashes[chance.randrange(stored)]]
        prefill, decode = chance.choice(prefills), chance.choice(decodes)
        held = chance.choice([0, 0, 7, PAGES])
        if chance.random() < 0.9:
            decode.request(room, hashes, prefill.name, held=held)
        reach = max(stored, held)
        first = chance.choice([0, 0, 4])
        job = prefill.request(room, hashes[:reach], first_page=first, stored=stored)
        requests.append((prefill, decode, job, room, stored))
        time.sleep(chance.expovariate(1 / 0.03))
        if chance.random() < 0.15:
            prefill, decode, job, room, _ = chance.choice(requests[-6:])
            if chance.random() < 0.6 and not job.done.is_set():
                job.abort()
                prefill.reads.gone(job.prefetch.handle)
            if chance.random() < 0.6 and not decode.hop.dead:
                decode.abort(room)
        if room == REQUESTS // 2 and seed == 2:
            decodes[2].kill()
    weather.clear()
    for decode in decodes:
        if not decode.hop.dead:
            decode.thaw()
    for _, decode, job, room, _ in requests:
        job.result()
        assert job.ended_s - job.started_s < CONFIG.read_deadline_s + 1.0
        job.check()
        if not decode.hop.dead:
            decode.settle(room)
            if room in decode.jobs:
                decode.jobs[room].result()
                decode.jobs[room].check()
    cluster.check()
    for prefill in prefills:
        mine = [job for engine, _, job, _, _ in requests if engine is prefill]
        assert prefill.pool.free_count + prefill.reserve.size + sum(job.kept for job in mine) == 3000
    brought = sum(job.kept for *_, job, _, _ in requests)
    assert brought > 0.6 * REQUESTS * PAGES


def test_an_abort_after_the_end_frees_nothing(cluster: Cluster) -> None:
    """The stress test's aborts come at any time, and what SGLang has in its tree is not theirs to free."""
    prefill, _, job = shared_read(cluster, pages=8)
    assert job.result() == 8
    free = prefill.pool.free_count
    job.abort()
    job.check()
    assert prefill.pool.free_count == free


def test_rooms_are_bounded(cluster: Cluster) -> None:
    prefill = cluster.prefill(policy="prefill")
    for room in range(5000):
        prefill.reads.arrived(room, f"handle-{room}")
    assert len(prefill.reads.rooms) <= 4096
    assert len(prefill.reads._room_of) == len(prefill.reads.rooms)
