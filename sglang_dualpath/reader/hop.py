"""Threads that carry a decode engine's chunks: one reads storage, one per prefill engine pushes.

While chunk k is pushed, chunk k+1 is read. A pusher of its own for every prefill engine means that a frozen one delays
nobody else: the reader never waits for a pusher, because no more chunks of one engine are carried at a time than
:class:`~sglang_dualpath.reader.pump.ClaimPump` lets through.
"""

from __future__ import annotations

import logging
import queue
import threading
import time

from sglang_dualpath import metrics
from sglang_dualpath.errors import NotPushedError, TransferError
from sglang_dualpath.reader.decode import Chunk, DecodeReads
from sglang_dualpath.reader.prefetch import ReadLimit
from sglang_dualpath.reader.priority import PUSHING, READING, give_way
from sglang_dualpath.transfer import Peer, PlaneGeometry, PoolGeometry, Transport

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.1
# A pusher without work for so long ends, lest one is left for every prefill engine that ever was.
_PUSHER_IDLE_S = 60.0


class HopReader:
    """Reads granted chunks out of storage and hands them to the pusher of their prefill engine."""

    def __init__(
        self,
        reads: DecodeReads,
        transport: Transport,
        *,
        count: int,
        limit: ReadLimit,
        pusher_idle_s: float = _PUSHER_IDLE_S,
    ) -> None:
        self._reads = reads
        self._chunks = reads.carriage
        self._transport = transport
        self._limit = limit
        self._pusher_idle_s = pusher_idle_s
        self._stop = threading.Event()
        self._pushers: dict[str, _Pusher] = {}
        self._pushers_lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, name=f"dualpath-hop-reader-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        give_way(READING)
        while not self._stop.is_set():
            chunk: Chunk | None = None
            try:
                delay_s = self._limit.delay_s()
                # Until storage may be read again, a chunk from there stays where a cancel takes it back at once.
                chunk = self._chunks.next_chunk(min(delay_s or _IDLE_WAIT_S, _IDLE_WAIT_S), memory_only=delay_s > 0)
                if chunk is not None:
                    self._carry(chunk)
            except Exception:
                logger.exception("A chunk of room %s was lost.", chunk.read.room if chunk else "?")
                metrics.FALLBACKS.add(reason="hop_exception")
                if chunk is not None:
                    self._chunks.pushed(chunk, "internal error, see the decode server's log")
                else:
                    self._stop.wait(_IDLE_WAIT_S)  # an error that repeats must not take a core

    def _carry(self, chunk: Chunk) -> None:
        if not chunk.grant.memory:
            self._read(chunk, self._chunks.source_slots(chunk))
        offer = chunk.read.offer
        assert offer is not None
        if chunk.good_pages == 0:
            self._chunks.pushed(chunk, None)
            return
        # Under the lock: a pusher that is idle ends only while nothing is handed to it.
        with self._pushers_lock:
            session = offer.target.session
            if session not in self._pushers:
                self._pushers[session] = _Pusher(self, session)
            self._pushers[session].queue.put(chunk)

    def _read(self, chunk: Chunk, slots: list[int]) -> None:
        prefetch = chunk.read.prefetch
        assert prefetch is not None
        started = time.monotonic()
        good = 0
        try:
            if not prefetch.is_cancelled():
                self._limit.spend(len(slots) * self._reads.pages.page_bytes)
                good = prefetch.read_pages(chunk.first_page - prefetch.first_page, slots)
        except Exception:
            logger.exception("Storage read of %d pages failed for room %s.", len(slots), chunk.read.room)
            metrics.FALLBACKS.add(reason="storage_exception")
        self._chunks.was_read(chunk, max(0, min(good, len(slots))), time.monotonic() - started)

    def stop(self) -> None:
        """Ask all threads to end; what they do now is finished first. Does not wait longer than 2 s for each."""
        self._stop.set()
        with self._pushers_lock:
            pushers, self._pushers = list(self._pushers.values()), {}
        for pusher in pushers:
            pusher.queue.put(None)
        for thread in (*self._threads, *(pusher.thread for pusher in pushers)):
            thread.join(2.0)

    # -- for pushers -------------------------------------------------------------------------------------------------

    def push(self, session: str, chunk: Chunk) -> None:
        """Push one chunk and say its last word."""
        problem = self._chunks.refused_push(chunk)
        if problem is not None:
            self._chunks.pushed(chunk, problem)
            return
        try:
            source = self._chunks.source_slots(chunk)[: chunk.good_pages]
            peer = _peer(chunk)
        except Exception as fault:
            logger.exception("No push to %s.", session)
            self._chunks.pushed(chunk, f"{type(fault).__name__} before the push")
            return
        started = time.monotonic()
        try:
            self._transport.push(peer, source, chunk.grant.slots[: chunk.good_pages])
        except NotPushedError as error:
            self._chunks.pushed(chunk, str(error))
        except TransferError as error:
            self._chunks.pushed(chunk, str(error), drain_s=self._transport.drain_s, over=error.over)
        except Exception as fault:
            logger.exception("Push to %s failed.", session)
            problem = f"{type(fault).__name__} in the transfer engine"
            self._chunks.pushed(chunk, problem, drain_s=self._transport.drain_s)
        else:
            self._chunks.pushed(chunk, None, took_s=time.monotonic() - started)

    def next_push(self, pusher: _Pusher) -> Chunk | None:
        """The next chunk for ``pusher``; None when it is to end."""
        while True:
            try:
                return pusher.queue.get(timeout=self._pusher_idle_s)
            except queue.Empty:
                with self._pushers_lock:
                    if pusher.queue.empty():
                        if self._pushers.get(pusher.session) is pusher:
                            del self._pushers[pusher.session]
                        return None


def _peer(chunk: Chunk) -> Peer:
    """Where the prefill engine that granted the chunk said its host pool is."""
    offer = chunk.read.offer
    assert offer is not None
    target = offer.target
    planes = tuple(PlaneGeometry(plane.base, plane.stride_bytes, plane.page_bytes) for plane in target.planes)
    return Peer(target.session, target.metadata, PoolGeometry(planes, target.slots))


class _Pusher:
    """Pushes chunks to one prefill engine, in order."""

    def __init__(self, hop: HopReader, session: str) -> None:
        self.session = session
        self.queue: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
        self._hop = hop
        self.thread = threading.Thread(target=self._run, name=f"dualpath-push-{session}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        give_way(PUSHING)
        while (chunk := self._hop.next_push(self)) is not None:
            self._hop.push(self.session, chunk)
