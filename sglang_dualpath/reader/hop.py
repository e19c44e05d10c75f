"""Threads that carry a decode engine's chunks: one reads storage, one per prefill engine pushes.

While chunk k is pushed, chunk k+1 is read. A pusher of its own for every prefill engine means that a frozen one delays
nobody else.
"""

from __future__ import annotations

import logging
import queue
import threading
import time

from sglang_dualpath import metrics
from sglang_dualpath.errors import TransferError
from sglang_dualpath.reader.decode import Chunk, DecodeReads
from sglang_dualpath.reader.pool import PlaneGeometry, push_plan
from sglang_dualpath.reader.prefetch import ReadLimit
from sglang_dualpath.transfer import Transport

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.1
# Chunks read and waiting for their push: one, so that the reader is one chunk ahead and pins no more host pages.
_PUSHES_WAITING = 1


class HopReader:
    """Reads granted chunks out of storage and hands them to the pusher of their prefill engine."""

    def __init__(self, reads: DecodeReads, transport: Transport, *, count: int, limit: ReadLimit) -> None:
        self._reads = reads
        self._transport = transport
        self._limit = limit
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
        while not self._stop.is_set():
            chunk = self._reads.next_chunk(_IDLE_WAIT_S)
            if chunk is None:
                continue
            try:
                self._carry(chunk)
            except Exception:
                logger.exception("A chunk of room %s was lost.", chunk.read.room)
                metrics.FALLBACKS.add(reason="hop_exception")
                chunk.reading = False
                self._reads.pushed(chunk, "internal error, see the decode server's log")

    def _carry(self, chunk: Chunk) -> None:
        if not chunk.grant.memory:
            self._read(chunk)
        offer = chunk.read.offer
        assert offer is not None
        if chunk.good_pages == 0:
            self._reads.pushed(chunk, None)
            return
        if not self._pusher(offer.target.session).put(chunk):
            self._reads.pushed(chunk, "the prefill engine takes no more pushes")

    def _read(self, chunk: Chunk) -> None:
        prefetch = chunk.read.prefetch
        assert prefetch is not None
        slots = self._reads.source_slots(chunk)
        delay_s = self._limit.delay_s(len(slots) * self._reads.pages.page_bytes)
        if delay_s:
            self._stop.wait(delay_s)
        started = time.monotonic()
        good = 0
        try:
            if not prefetch.is_cancelled():
                good = prefetch.read_pages(chunk.grant.first_page - prefetch.first_page, slots)
        except Exception:
            logger.exception("Storage read of %d pages failed for room %s.", len(slots), chunk.read.room)
            metrics.FALLBACKS.add(reason="storage_exception")
        self._reads.was_read(chunk, good, time.monotonic() - started)

    def _pusher(self, session: str) -> _Pusher:
        with self._pushers_lock:
            pusher = self._pushers.get(session)
            if pusher is None:
                pusher = self._pushers[session] = _Pusher(self._reads, self._transport, session)
            return pusher

    def forget(self, session: str) -> None:
        """The prefill engine with this session is gone; its pusher ends."""
        with self._pushers_lock:
            pusher = self._pushers.pop(session, None)
        if pusher is not None:
            pusher.stop()

    def stop(self) -> None:
        """Ask all threads to end; what they do now is finished first. Does not wait longer than 2 s for each."""
        self._stop.set()
        with self._pushers_lock:
            pushers, self._pushers = list(self._pushers.values()), {}
        for pusher in pushers:
            pusher.stop()
        for thread in self._threads:
            thread.join(2.0)


class _Pusher:
    """Pushes chunks to one prefill engine, in order."""

    def __init__(self, reads: DecodeReads, transport: Transport, session: str) -> None:
        self._reads = reads
        self._transport = transport
        self._session = session
        self._queue: queue.Queue[Chunk | None] = queue.Queue(_PUSHES_WAITING)
        self._thread = threading.Thread(target=self._run, name=f"dualpath-push-{session}", daemon=True)
        self._thread.start()

    def put(self, chunk: Chunk) -> bool:
        """Queue a chunk; False when its lease ends before there is room."""
        while (left_s := chunk.deadline_s - self._reads.clock()) > 0:
            try:
                self._queue.put(chunk, timeout=left_s)
            except queue.Full:
                continue
            return True
        return False

    def _run(self) -> None:
        while (chunk := self._queue.get()) is not None:
            try:
                error = self._push(chunk)
            except Exception as fault:
                logger.exception("Push to %s failed.", self._session)
                error = f"{type(fault).__name__} in the decode engine"
            self._reads.pushed(chunk, error)

    def _push(self, chunk: Chunk) -> str | None:
        offer = chunk.read.offer
        assert offer is not None
        # After its lease the slots may be another writer's. A freeze between this line and the push is what the
        # prefill engine's quarantine of taken-back slots is for.
        if self._reads.clock() >= chunk.deadline_s:
            return "lease over before the push"
        source = self._reads.source_slots(chunk)[: chunk.good_pages]
        target = [PlaneGeometry(plane.base, plane.stride_bytes, plane.page_bytes) for plane in offer.target.planes]
        plan = push_plan(self._reads.pages.planes, source, target, chunk.grant.slots[: chunk.good_pages])
        try:
            self._transport.push(self._session, plan)
        except TransferError as error:
            return str(error)
        return None

    def stop(self) -> None:
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            logger.warning("The pusher to %s is still busy; it ends with the process.", self._session)
