"""Prefill and decode engines of one process: the real reads, readers, desks and pushes, with SGLang's part made small.

SGLang's part is the scheduler that accepts requests and allocates host pages, and the thread that asks for 8 pages of
one prefetch after the other and then inserts what it got and frees the rest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from sglang_dualpath import metrics
from sglang_dualpath.config import DualPathConfig
from sglang_dualpath.ledger import Reserve
from sglang_dualpath.policy import load_policy
from sglang_dualpath.protocol import Hello, Message
from sglang_dualpath.reader.decode import Answer, DecodeRead, DecodeReads, Phase
from sglang_dualpath.reader.hop import HopReader
from sglang_dualpath.reader.offers import OfferDesk
from sglang_dualpath.reader.own import OwnReaders
from sglang_dualpath.reader.prefetch import Prefetch, ReadLimit
from sglang_dualpath.reader.prefill import PrefillReads
from tests.reader.hop import Hop
from tests.reader.host import PAGE_TOKENS, PLANE_BYTES, WAIT_S, Slots, Storage, content, prompt, wait_for
from tests.reader.jobs import BATCH_PAGES, Job, PrefetchThread
from tests.reader.wire import Wire

PAGE_BYTES = sum(PLANE_BYTES)

CONFIG = DualPathConfig(
    chunk_bytes=3 * PAGE_BYTES, lease_s=0.3, hello_silence_s=0.9, read_deadline_s=8.0, claims_in_flight=2,
    reader_threads=1,  # one after the other, so that tests can say which
)
# For tests of what no fault comes into, on a machine that is busy with other things: nothing is waited for in vain.
PATIENT = msgspec.structs.replace(CONFIG, lease_s=10.0, hello_silence_s=20.0, read_deadline_s=60.0)


class Engine:
    """What both kinds of engine share."""

    reads: PrefillReads | DecodeReads

    def __init__(self, cluster: Cluster, name: str, slots: int, config: DualPathConfig) -> None:
        self.cluster = cluster
        self.name = name
        self.config = config
        self.pool = Slots(slots)
        self.hop = Hop(name, self.pool, cluster.sessions)
        self.storage = cluster.storage
        self.limit = ReadLimit(config.read_rate_limit_bytes_per_s)

    def prefetch(self, first_page: int, hashes: list[str], stored: int, room: int | None) -> Job:
        slots = self.pool.alloc(len(hashes))
        job: Job

        def read_pages(first: int, into: Sequence[int]) -> int:
            return self.storage.read(job.hashes[first : first + len(into)], self.pool, into, f"reader of {self.name}")

        prefetch = Prefetch(
            handle=object(),
            first_page=first_page,
            stored_pages=stored,
            hashes=hashes,
            host_indices=self.pool.pages.indices(slots),
            read_pages=read_pages,
            is_cancelled=lambda: job.cancelled.is_set(),
        )
        job = Job(room, prefetch, hashes, self.pool, time.monotonic())
        return job


class PrefillEngine(Engine):
    reads: PrefillReads

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        *,
        slots: int,
        reserve: int,
        policy: str,
        config: DualPathConfig,
        readers: int,
    ) -> None:
        super().__init__(cluster, name, slots, config)
        self.reserve = Reserve(self.pool.alloc(reserve))
        self.reads = PrefillReads(config=config, pages=self.pool.pages, reserve=self.reserve)
        about = self.hop.metadata
        self.desk = OfferDesk(
            self.reads, policy=load_policy(policy), engine=name, session=name, metadata=about, send=self._send
        )
        cluster.wire.join(name, lambda sender, message: self.desk.handle(sender.encode(), message), self._tick)
        self.own = OwnReaders(self.reads, count=readers, limit=self.limit)
        self.io = PrefetchThread(self.reads, self.pool, lambda job: None)

    def _send(self, peer: bytes, message: Message) -> bool:
        return self.cluster.wire.send(self.name, peer.decode(), message)

    def _tick(self) -> None:
        self.desk.tick(0.0)

    def request(self, room: int | None, hashes: list[str], *, first_page: int = 0, stored: int | None = None) -> Job:
        """A request arrives whose pages from ``first_page`` on are not here; the first ``stored`` are in storage."""
        stored = len(hashes) if stored is None else stored
        job = self.prefetch(first_page, hashes[first_page:], stored - first_page, room)
        if room is not None:
            self.reads.arrived(room, job.prefetch.handle)
        self.reads.opened(job.prefetch)
        self.io.queue.put(job)
        return job

    def stop(self) -> None:
        self.reads.stop()
        self.own.stop()
        self.io.queue.put(None)
        self.io.thread.join(5)


class DecodeEngine(Engine):
    reads: DecodeReads

    def __init__(self, cluster: Cluster, name: str, *, slots: int, config: DualPathConfig, readers: int) -> None:
        super().__init__(cluster, name, slots, config)
        self.jobs: dict[int, Job] = {}
        self.requests: dict[int, tuple[list[str], int]] = {}
        self.reads = DecodeReads(config=config, pages=self.pool.pages, engine=name, rank=0, send=self._send)
        cluster.wire.join(name, self.reads.handle, self._tick)
        self.carrier = HopReader(
            self.reads, self.hop, count=readers, limit=self.limit, pusher_idle_s=cluster.pusher_idle_s
        )
        self.io = PrefetchThread(self.reads, self.pool, self._inserted)

    def _send(self, endpoint: str, message: Message) -> bool:
        return self.cluster.wire.send(self.name, endpoint, message)

    def _inserted(self, job: Job) -> None:
        if not job.cancelled.is_set():
            assert job.read is not None
            self.reads.settled(job.read)

    def hold(self, hashes: list[str]) -> list[int]:
        """Host slots that hold these pages already."""
        slots = self.pool.alloc(len(hashes))
        for slot, page_hash in zip(slots, hashes, strict=True):
            for plane, data in enumerate(content(page_hash)):
                self.pool.write(slot, plane, data, "test")
        self.pool.seal(slots)
        return slots

    def request(
        self, room: int, hashes: list[str], prefill: str | None, *, held: int = 0, match: int | None = None
    ) -> DecodeRead:
        """The decode queue accepts a request of which ``match`` pages are here, ``held`` of them in host memory."""
        match = held if match is None else match
        self.requests[room] = (hashes, match)
        read = self.reads.accepted(
            room, object(), match_pages=match, held_slots=self.hold(hashes[:held]), held_hashes=hashes[:held]
        )
        self.reads.greet(read, prefill)
        return read

    def _tick(self) -> None:
        """The control thread's tick, and the scheduler's turn."""
        self.reads.tick(0.0)
        for read in list(self.reads.reads.values()):
            standing = self.reads.standing(read)
            if standing.over:
                self.reads.forget(read)
            if standing.answer != Answer.OFFER:
                if standing.answer == Answer.NONE and read.phase is Phase.OFFERED:
                    self.reads.withdraw(read)
                continue
            hashes, match = self.requests[read.room]
            offer = read.offer
            assert offer is not None
            if offer.storage_end_page <= match:
                self.reads.without_prefetch(read)
                continue
            job = self.prefetch(
                match, hashes[match : offer.storage_end_page], offer.storage_end_page - match, read.room
            )
            job.read = read
            self.jobs[read.room] = job
            self.reads.submitted(read)
            self.reads.opened(read, job.prefetch)
            self.io.queue.put(job)

    def abort(self, room: int) -> None:
        job = self.jobs.get(room)
        self.reads.gone(room)
        if job is not None and not job.done.is_set():
            job.abort()

    def freeze(self) -> None:
        """SIGSTOP: no message, no tick, and whatever a thread was doing goes on after it wakes."""
        self.cluster.wire.freeze(self.name)
        self.hop.gate.clear()

    def thaw(self) -> None:
        self.hop.gate.set()
        self.cluster.wire.thaw(self.name)

    def kill(self) -> None:
        """The process dies; the kernel of the prefill server notices."""
        self.hop.dead = True
        self.cluster.wire.kill(self.name)
        self.hop.gate.set()
        for engine in self.cluster.prefills:
            engine.desk.gone(self.name.encode())

    def settle(self, room: int, within_s: float = WAIT_S) -> None:
        wait_for(lambda: not self.reads.pending(room), f"room {room} settled", within_s)

    def stop(self) -> None:
        self.hop.gate.set()
        self.reads.stop()
        self.carrier.stop()
        self.io.queue.put(None)
        self.io.thread.join(5)


class Cluster:
    """Engines of one test on one wire, with one storage."""

    def __init__(self, *, pusher_idle_s: float = 60.0) -> None:
        self.config = CONFIG
        """Of engines that are made without one."""
        self.wire = Wire()
        self.storage = Storage()
        self.sessions: dict[str, Slots] = {}
        self.pusher_idle_s = pusher_idle_s
        self.prefills: list[PrefillEngine] = []
        self.decodes: list[DecodeEngine] = []
        self._counted = metrics.snapshot()

    def prefill(
        self,
        name: str = "prefill-1",
        *,
        slots: int = 256,
        reserve: int = 24,
        policy: str = "split",
        config: DualPathConfig | None = None,
        readers: int = 1,
    ) -> PrefillEngine:
        config = config or self.config
        engine = PrefillEngine(self, name, slots=slots, reserve=reserve, policy=policy, config=config, readers=readers)
        self.prefills.append(engine)
        return engine

    def decode(
        self, name: str = "decode-1", *, slots: int = 256, config: DualPathConfig | None = None, readers: int = 1
    ) -> DecodeEngine:
        engine = DecodeEngine(self, name, slots=slots, config=config or self.config, readers=readers)
        self.decodes.append(engine)
        return engine

    def stored(self, name: str, pages: int) -> list[str]:
        """The hashes of a prompt that is in storage."""
        hashes = prompt(name, pages)
        self.storage.put(hashes)
        return hashes

    def request(self, hashes: list[str], *, held: int = 0, first_page: int = 0, stored: int | None = None) -> Job:
        """Room 1 on the first pair: the decode engine has asked about it before it reaches the prefill engine."""
        prefill, decode = self.prefills[0], self.decodes[0]
        decode.request(1, hashes, prefill.name, held=held)
        wait_for(lambda: self.wire.sent(Hello))
        return prefill.request(1, hashes, first_page=first_page, stored=stored)

    def counted(self, name: str) -> float:
        """How much a metric grew in this test."""
        return metrics.snapshot().get(name, 0.0) - self._counted.get(name, 0.0)

    def fallbacks(self, reason: str) -> float:
        return self.counted(f'sglang_dualpath_fallbacks_total{{reason="{reason}"}}')

    def check(self) -> None:
        """After all reads have ended: nothing was written where it must not be, and nothing is left over."""
        for prefill in self.prefills:
            wait_for(lambda p=prefill: not p.reads.late, f"last words of {prefill.name}: {prefill.reads.late}")
            assert prefill.reserve.free == prefill.reserve.size
            assert not prefill.reads.reads
            assert not prefill.reads.by_number
        for decode in self.decodes:
            if not decode.hop.dead:
                wait_for(lambda d=decode: not d.reads.reads, f"reads of {decode.name} over: {decode.reads.reads}")
                assert not decode.reads.in_hand
                assert not decode.reads._by_prefetch
        for engine in (*self.prefills, *self.decodes):
            assert not engine.io.errors, engine.io.errors
            assert not engine.pool.violations
            assert not engine.hop.strangers
        assert not self.wire.errors, self.wire.errors

    def close(self) -> None:
        self.storage.gate.set()
        for engine in (*self.decodes, *self.prefills):
            engine.stop()
        self.wire.close()


@contextmanager
def running(cluster: Cluster) -> Iterator[Cluster]:
    before = set(threading.enumerate())
    try:
        yield cluster
    finally:
        cluster.close()
    wait_for(lambda: not (set(threading.enumerate()) - before), "threads ended", 5.0)


def shared_read(
    cluster: Cluster, *, policy: str = "decode", pages: int, held: int = 0, stored: int | None = None
) -> tuple[PrefillEngine, DecodeEngine, Job]:
    """A pair of engines with one request on both."""
    prefill, decode = cluster.prefill(policy=policy), cluster.decode()
    hashes = prompt("a", pages)
    cluster.storage.put(hashes[:stored])
    return prefill, decode, cluster.request(hashes, held=held, stored=stored)


__all__ = [
    "BATCH_PAGES",
    "CONFIG",
    "Cluster",
    "PAGE_BYTES",
    "PAGE_TOKENS",
    "PATIENT",
    "Phase",
    "prompt",
    "running",
    "wait_for",
]
