"""The decode engine's side: its share of each read, kept in its own host memory and pushed to the prefill engine.

Threads, and what each may do:

* scheduler: ``accepted``, ``sought``, ``standing``, ``submitted``, ``opened``, ``settled``, ``gone``, ``pending``;
* SGLang's prefetch IO thread: ``opened``, ``wait`` and ``finish``;
* the reader thread and the pushers: see :mod:`sglang_dualpath.reader.carriage`;
* the control thread: ``handle`` (see :mod:`sglang_dualpath.reader.decode_messages`) and ``tick``;
* the lookup thread: ``greet``.

One lock guards it all; no I/O happens while it is held.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence

from sglang_dualpath import __version__, metrics
from sglang_dualpath.protocol import PROTOCOL_VERSION, Bye, Decline, Hello, Message
from sglang_dualpath.reader.carriage import Carriage, give_up
from sglang_dualpath.reader.decode_messages import DecodeMessages
from sglang_dualpath.reader.decode_read import Answer, Chunk, DecodeRead, Phase, Standing
from sglang_dualpath.reader.decode_state import DecodeState
from sglang_dualpath.reader.prefetch import Prefetch

__all__ = ["Answer", "Chunk", "DecodeRead", "DecodeReads", "Phase", "Standing"]

logger = logging.getLogger(__name__)

# How often a waiting thread looks whether SGLang cancelled its operation, which wakes nobody.
_CANCEL_POLL_S = 0.05
_GAUGES_S = 1.0
# In leases.
_HANGING = 0.2


class DecodeReads(DecodeState):
    """All reads of one decode engine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.carriage = Carriage(self)
        self._messages = DecodeMessages(self)
        self._by_prefetch: dict[int, DecodeRead] = {}
        self._gauges_s = 0.0

    # -- scheduler thread ----------------------------------------------------------------------------------------

    def accepted(
        self, room: int, handle: Hashable, *, match_pages: int, held_slots: Sequence[int], held_hashes: Sequence[str]
    ) -> DecodeRead:
        """The decode queue has accepted a request. Its bootstrap is held back until the read has settled."""
        read = DecodeRead(
            room=room,
            handle=handle,
            endpoint=None,
            match_pages=match_pages,
            held_slots=held_slots,
            held_hashes=held_hashes,
            deadline_s=self.clock() + self.config.read_deadline_s,
            heard_s=math.inf,
        )
        with self.lock:
            before = self.reads.pop(room, None)
            if before is not None:
                self.end(before, "replaced")
            self.reads[room] = read
        return read

    def pending(self, room: int) -> bool:
        """True while the request's bootstrap must wait for its read."""
        with self.lock:
            read = self.reads.get(room)
            return read is not None and read.phase is not Phase.SETTLED

    def sought(self, read: DecodeRead) -> None:
        """Its prefill engine is known and about to be asked: from now on its silence counts."""
        with self.lock:
            read.heard_s = min(read.heard_s, self.clock())

    def standing(self, read: DecodeRead) -> Standing:
        """What this rank knows of a read. Of use only before SGLang has its prefetch, and after its end."""
        with self.lock:
            offer = read.offer
            if read.phase is Phase.SETTLED or read.ended is not None:
                answer = Answer.NONE
            elif read.phase is Phase.OFFERED and self.clock() >= read.parked_until_s:
                answer = Answer.OFFER
            else:
                answer = Answer.LATER
            return Standing(
                answer,
                end_page=offer.storage_end_page if offer is not None else 0,
                minus_first_page=-offer.first_page if offer is not None else 0,
                order=read.order,
                over=int(read.phase is Phase.SETTLED and read.over),
            )

    def withdraw(self, read: DecodeRead) -> None:
        """Another rank of this server prefetches nothing for this request, so this one must not either.

        What it holds in memory is pushed all the same. A read that has settled stays as it is.
        """
        with self.lock:
            if read.phase is Phase.SETTLED:
                return
            if read.ended is None and read.memory_left <= 0 and not read.granted:
                if read.offer is None:
                    self.say(read, Bye(read.room, read.attempt))
                else:
                    metrics.OFFERS.add(outcome="left_by_other_rank")
                    self.say(read, Decline(read.room, read.attempt, "another rank does not take part"))
                self.end(read, "another_rank")
            self.settle(read)

    def without_prefetch(self, read: DecodeRead, why: str | None = None) -> None:
        """Nothing is to be read from storage here; what is held in memory is pushed while the request goes on."""
        with self.lock:
            # Granted chunks are all of what it holds in memory: without host pages nothing else is claimed.
            if why is not None and read.memory_left <= 0 and not read.granted and read.ended is None:
                self.say(read, Decline(read.room, read.attempt, why))
                self.end(read, why)
            self.settle(read)

    def submitted(self, read: DecodeRead) -> None:
        """SGLang accepted a prefetch of the offered pages: the request waits for its end, whatever else has ended."""
        with self.lock:
            read.phase = Phase.SUBMITTED

    def parked(self, read: DecodeRead, delay_s: float, reason: str) -> None:
        """SGLang has no room for the prefetch now: :meth:`standing` says OFFER again after ``delay_s``.

        Counted once per read.
        """
        with self.lock:
            if read.phase in (Phase.OFFERED, Phase.SUBMITTED):
                read.phase = Phase.OFFERED
                if not read.parked_until_s:
                    metrics.PARKED.add(engine_role="decode", reason=reason)
                    logger.info("DualPath read of room %d waits (%s).", read.room, reason)
                read.parked_until_s = self.clock() + delay_s
                if read.ended is not None:
                    self.settle(read)

    def opened(self, read: DecodeRead, prefetch: Prefetch) -> None:
        """Host pages are allocated: claims may go out. Idempotent, and nothing once the prefetch is over."""
        with self.lock:
            if read.prefetch is None and not prefetch.over:
                read.prefetch = prefetch
                if self.reads.get(read.room) is read:
                    self.reads.move_to_end(read.room)
                if read.phase is not Phase.SETTLED:
                    read.phase = Phase.READING
                self._by_prefetch[id(prefetch)] = read
                self.pump()
                self.lock.notify_all()

    def settled(self, read: DecodeRead) -> None:
        """SGLang has inserted what the prefetch brought: the request may go on."""
        with self.lock:
            self.settle(read)

    def gone(self, room: int) -> DecodeRead | None:
        """The request has left this engine; returns its read so that the caller can release what it locked."""
        with self.lock:
            read = self.reads.get(room)
            if read is None:
                return None
            if read.ended is None:
                self.say(read, Bye(room, read.attempt))
            self.end(read, "request_gone")
            self.settle(read)
            return read

    def forget(self, read: DecodeRead) -> None:
        """It is over on every rank."""
        with self.lock:
            if self.reads.get(read.room) is read:
                del self.reads[read.room]

    def abandon_all(self) -> None:
        """SGLang clears its pools: every read ends, and nothing of it counts any more.

        Waits for storage reads in flight, as SGLang itself does.
        """
        with self.lock:
            for read in list(self.reads.values()):
                self.end(read, "flushed")
                if read.prefetch is not None:
                    read.prefetch.over = True
                    self._by_prefetch.pop(id(read.prefetch), None)
                give_up(read.busy, "the host pool was cleared")
                self._await_sources(read)
                self.settle(read)
                read.abandoned = True

    # -- SGLang's prefetch IO thread -----------------------------------------------------------------------------

    def wait(self, prefetch: Prefetch, first: int, count: int) -> int:
        """Block until pages ``first .. first + count`` (relative) are here or no more come; return the leading ones."""
        with self.lock:
            read = self._by_prefetch.get(id(prefetch))
            if read is None:
                return 0
            wanted = range(prefetch.first_page + first, prefetch.first_page + first + count)
            while not all(page in read.landed for page in wanted):
                if prefetch.is_cancelled() or self.stopped:
                    self.end(read, "cancelled")
                    break
                if read.reads_no_more:
                    break
                self.lock.wait(_CANCEL_POLL_S)
            return max(0, min(count, read.kept_pages() - first))

    def finish(self, prefetch: Prefetch) -> None:
        """The transfer is over and SGLang is about to insert or free its pages: see that nothing uses them.

        A storage read writes into them, and is waited for. A push in progress reads from them: it is waited for while
        it is in its lease, after which the prefill engine does not accept its bytes.
        """
        with self.lock:
            prefetch.over = True
            read = self._by_prefetch.pop(id(prefetch), None)
            if read is None:
                return
            if read.memory_left > 0 and not prefetch.is_cancelled():
                # What is held in memory is pushed on.
                for chunk in [chunk for chunk in read.granted if not chunk.grant.memory]:
                    self.drop(chunk)
            else:
                self.end(read, "finished")
            self._await_sources(read)
            self.pump()

    def _await_sources(self, read: DecodeRead) -> None:
        while any(chunk.holds(self.clock()) for chunk in read.storage_chunks()):
            if self.stopped or (read.prefetch is not None and read.prefetch.is_cancelled()):
                give_up(read.storage_chunks(), "the request was aborted")
            self.lock.wait(_CANCEL_POLL_S)

    # -- control thread ------------------------------------------------------------------------------------------

    def greet(self, read: DecodeRead, endpoint: str | None, why_not: str = "prefill_without_dualpath") -> None:
        """The prefill engine's control endpoint was found (None: it has none to greet). Runs on any thread."""
        with self.lock:
            if read.phase is not Phase.GREETING or read.ended is not None:
                return
            if endpoint is None:
                self.fall_back(read, why_not)
                self.settle(read)
                return
            read.endpoint = endpoint
            read.heard_s = self.clock()
            self.say(
                read,
                Hello(
                    room=read.room,
                    version=PROTOCOL_VERSION,
                    package=__version__,
                    rank=self.rank,
                    engine=self.engine,
                    page_tokens=self.pages.page_tokens,
                    page_bytes=self.pages.page_bytes,
                    plane_bytes=tuple(plane.page_bytes for plane in self.pages.planes),
                    tp_size=self.tp_size,
                    session=self.sessions.known(endpoint),
                    match_pages=read.match_pages,
                    held_end_page=len(read.held_slots),
                    queued_read_bytes=self.queued_bytes(),
                    read_bytes_per_s=self.rate.bytes_per_s,
                    hop_bytes_per_s=self.hop_rate.bytes_per_s,
                ),
            )

    def handle(self, endpoint: str, message: Message) -> None:
        """One message of a prefill engine."""
        with self.lock:
            self._messages.handle(endpoint, message)

    def tick(self, now: float) -> None:
        """End reads whose peer is silent or whose deadline has passed, and say the words that had to wait."""
        del now  # the reads' own clock counts
        with self.lock:
            clock = self.clock()
            for read in list(self.reads.values()):
                if read.ended is None:
                    self._look_after(read, clock)
                elif read.abandoned and read.over:
                    del self.reads[read.room]
            self._end_where_pushes_hang(clock)
            waiting, self.draining = self.draining, []
            for one in waiting:
                if clock < one.due_s or not one.over():
                    self.draining.append(one)
                    continue
                self.in_hand.discard((one.endpoint, one.word.claim_id))
                if one.endpoint is not None:
                    self.send(one.endpoint, one.word)
            self.drop_overdue()
            self.pump()
            if clock >= self._gauges_s + _GAUGES_S:
                self._gauges_s = clock
                metrics.READ_QUEUE_BYTES.set(self.queued_bytes())

    def _look_after(self, read: DecodeRead, clock: float) -> None:
        silence_s = self.config.hello_silence_s
        overdue = [number for number, asked in read.requested.items() if clock - asked.sent_s > silence_s]
        if (read.phase is Phase.GREETING or overdue) and clock - read.heard_s > silence_s:
            if read.endpoint is not None:
                self.on_silence(read.endpoint)
            self._give_up(read, "prefill_silent")
        elif clock >= read.deadline_s:
            self._give_up(read, "read_deadline")
        else:
            # The prefill engine lives, but claim or answer got lost: ask again.
            for number in overdue:
                del read.requested[number]

    def _end_where_pushes_hang(self, clock: float) -> None:
        """Requests must not wait for a push that outlasts its lease: until it ends, its read is granted nothing.

        Nor are other reads, once all that may be under way to one prefill engine waits behind it.
        """
        late = [
            chunk
            for read in self.reads.values()
            for chunk in read.busy
            if not chunk.reading and clock >= chunk.deadline_s
        ]
        for chunk in late:
            chunk.overdue_s = clock if chunk.overdue_s is None else chunk.overdue_s
        # One that ends soon was held up by a frozen process, this one for example.
        hanging = [chunk for chunk in late if clock >= (chunk.overdue_s or 0.0) + _HANGING * self.config.lease_s]
        stuck = {chunk.read.room for chunk in hanging}
        blocked = {chunk.read.endpoint for chunk in hanging}
        for read in list(self.reads.values()):
            starves = read.takes_storage and not (read.requested or read.granted) and read.endpoint in blocked
            if read.ended is None and (read.room in stuck or starves):
                self.fall_back(read, "push_hangs")

    def _give_up(self, read: DecodeRead, why: str) -> None:
        self.say(read, Bye(read.room, read.attempt))
        self.fall_back(read, why)
        if read.phase in (Phase.GREETING, Phase.OFFERED):
            self.settle(read)

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            self.lock.notify_all()
