"""What the reader thread and the pushers of a decode engine do to its reads: take a granted chunk, say how it went."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from sglang_dualpath import metrics
from sglang_dualpath.protocol import Cancelled, Done, Fail, clip
from sglang_dualpath.reader.decode_read import Chunk
from sglang_dualpath.reader.decode_state import DecodeState, Withheld

logger = logging.getLogger(__name__)


class Carriage:
    """Chunks on their way from a grant to their last word. Every method takes the lock."""

    def __init__(self, state: DecodeState) -> None:
        self._state = state

    def next_chunk(self, timeout_s: float, *, memory_only: bool = False) -> Chunk | None:
        """The next granted chunk, those held in memory first, then as opened; waits up to ``timeout_s``."""
        with self._state.lock:
            chunk = self._take_chunk(memory_only)
            if chunk is None and not self._state.stopped:
                self._state.pump()
                # Nothing else wakes for a claim that is to be repeated, and the NIC may idle until then.
                repeat_s = self._state.claims.repeat_in_s(self._state.reads, self._state.clock())
                self._state.lock.wait(min(timeout_s, repeat_s))
                chunk = self._take_chunk(memory_only)
            return chunk

    def _take_chunk(self, memory_only: bool) -> Chunk | None:
        self._state.drop_overdue()
        chunk = None if self._state.stopped else self._state.claims.next_chunk(self._state.reads)
        if chunk is not None and memory_only and not chunk.grant.memory:
            return None
        if chunk is not None:
            chunk.read.granted.remove(chunk)
            if chunk.grant.memory:
                chunk.reading = False
                chunk.good_pages = len(chunk.grant.slots)
            chunk.read.busy.append(chunk)
            self._state.pump()
        return chunk

    def source_slots(self, chunk: Chunk) -> list[int]:
        """This engine's host slots of a chunk's pages."""
        with self._state.lock:
            read = chunk.read
            if chunk.grant.memory:
                return list(read.held_slots[chunk.first_page : chunk.end_page])
            assert read.prefetch is not None
            start = (chunk.first_page - read.prefetch.first_page) * self._state.pages.page_tokens
            stop = (chunk.end_page - read.prefetch.first_page) * self._state.pages.page_tokens
            return self._state.pages.slots_of(read.prefetch.host_indices[start:stop])

    def refused_push(self, chunk: Chunk) -> str | None:
        """Why a chunk must not be pushed (any more), or None."""
        with self._state.lock:
            if chunk.given_up is not None:
                return chunk.given_up
            # After its lease the slots may be another writer's. A freeze between this line and the push is what the
            # prefill engine's quarantine of taken-back slots is for.
            if self._state.clock() >= chunk.deadline_s:
                chunk.given_up, chunk.lease_lost = "lease over before the push", True
                self._state.lost_lease(chunk.read, "lease_over_unpushed")
            return chunk.given_up

    def was_read(self, chunk: Chunk, good_pages: int, seconds: float) -> None:
        """A storage read ended with so many good pages; they are this engine's to keep."""
        with self._state.lock:
            read = chunk.read
            chunk.reading = False
            chunk.good_pages = good_pages
            chunk.read_bytes = good_pages * self._state.pages.page_bytes
            read.landed.update(range(chunk.first_page, chunk.first_page + good_pages))
            if good_pages:
                self._state.rate.add(chunk.read_bytes, seconds, ended_s=self._state.clock())
            if good_pages < len(chunk.grant.slots):
                if read.prefetch is not None and read.prefetch.is_cancelled():
                    self._state.end(read, "cancelled")
                else:
                    self._state.fall_back(read, "decode_read_error")
            self._state.lock.notify_all()
        metrics.READ_BYTES.add(chunk.read_bytes, engine_role="decode", path="decode")

    def pushed(
        self,
        chunk: Chunk,
        error: str | None,
        *,
        took_s: float = 0.0,
        drain_s: float | None = None,
        over: Callable[[], bool] = lambda: True,
    ) -> None:
        """A chunk's push ended after ``took_s``, or was not tried (``error``).

        One that the transfer engine failed comes with ``drain_s``: bytes of it may arrive for so long, and until
        ``over()``.

        The first word on a chunk is the last one: another call changes nothing.
        """
        with self._state.lock:
            if chunk not in chunk.read.busy:
                return
            chunk.read.busy.remove(chunk)
            chunk.reading = False
            if error is None and chunk.good_pages:
                error = self._why_it_does_not_count(chunk)
            if error is None:
                if took_s > 0:
                    self._state.hop_rate.add(chunk.good_pages * self._state.pages.page_bytes, took_s)
                self._done(chunk)
            else:
                self._failed(chunk, error, drain_s, over)
            self._state.pump()
            self._state.lock.notify_all()

    def _why_it_does_not_count(self, chunk: Chunk) -> str | None:
        """Why a push that went through may have carried bytes of pages that were in other use by then, or None."""
        prefetch = None if chunk.grant.memory else chunk.read.prefetch
        if chunk.given_up is None and prefetch is not None and prefetch.is_cancelled():
            # SGLang frees what it was told of an operation as soon as it has marked it as terminated.
            chunk.given_up = "the request was aborted"
        if chunk.given_up is None and self._state.clock() >= chunk.deadline_s:
            chunk.lease_lost = True
            self._state.lost_lease(chunk.read, "lease_over_pushing")
            return "lease over during the push"
        return chunk.given_up

    def _failed(self, chunk: Chunk, error: str, drain_s: float | None, over: Callable[[], bool]) -> None:
        read, claim_id = chunk.read, chunk.grant.claim_id
        fail = Fail(read.room, chunk.grant.attempt, claim_id, clip(error))
        if chunk.lease_lost and drain_s is None:
            pass  # counted where it was seen
        elif chunk.given_up is None or chunk.lease_lost:
            logger.warning("Push for room %s failed: %s", read.room, error)
            self._state.fall_back(read, "push_failed")
        else:
            self._state.end(read, "given_up")
        if drain_s or not over():
            # Unsaid for so long, and the prefill engine takes the claim back by its lease, into quarantine.
            self._state.draining.append(Withheld(self._state.clock() + (drain_s or 0.0), over, read.endpoint, fail))
        elif chunk.given_up is None:
            self._state.last_word(read, fail)
        else:
            self._state.last_word(read, Cancelled(read.room, chunk.grant.attempt, claim_id))

    def _done(self, chunk: Chunk) -> None:
        size_bytes = chunk.good_pages * self._state.pages.page_bytes
        metrics.PUSHED_BYTES.add(size_bytes, engine_role="decode")
        self._state.last_word(
            chunk.read,
            Done(
                room=chunk.read.room,
                attempt=chunk.grant.attempt,
                claim_id=chunk.grant.claim_id,
                good_pages=chunk.good_pages,
                read_bytes=chunk.read_bytes,
                pushed_bytes=size_bytes,
                queued_read_bytes=self._state.queued_bytes(),
                read_bytes_per_s=self._state.rate.bytes_per_s,
                hop_bytes_per_s=self._state.hop_rate.bytes_per_s,
            ),
        )


def give_up(chunks: Iterable[Chunk], why: str) -> None:
    """The host pages of these chunks are not theirs any more: their pushes must not count."""
    for chunk in chunks:
        chunk.given_up = chunk.given_up or why
