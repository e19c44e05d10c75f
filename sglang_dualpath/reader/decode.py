"""The decode engine's side: its share of each read, kept in its own host memory and pushed to the prefill engine.

Threads, and what each may do:

* scheduler: ``accepted``, ``take_offers``, ``submitted``, ``opened``, ``settled``, ``gone``, ``pending``;
* SGLang's prefetch IO thread: ``wait`` and ``finish``;
* the reader thread: ``next_chunk`` (see :mod:`sglang_dualpath.reader.hop`); pushers: ``pushed``;
* the control thread: ``handle`` and ``tick``.

One lock guards it all; no I/O happens while it is held.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from sglang_dualpath import __version__, metrics
from sglang_dualpath.config import DualPathConfig
from sglang_dualpath.protocol import (
    PROTOCOL_VERSION,
    Bye,
    Cancel,
    Cancelled,
    Claim,
    Decline,
    Done,
    Fail,
    Grant,
    Hello,
    Message,
    NoOffer,
    Offer,
    Queued,
    Refuse,
    Settled,
    clip,
)
from sglang_dualpath.reader.pool import HostPages
from sglang_dualpath.reader.prefetch import Prefetch, Rate

logger = logging.getLogger(__name__)

_CANCEL_POLL_S = 0.05
# With two claims in flight a chunk then ends after about a quarter of its lease, which leaves room for a busy machine.
_LEASE_SHARE = 0.08
# Before the first measurement: 2 MiB take 80 ms on a 200 Mbit/s link.
_FIRST_CHUNK_BYTES = 2 << 20


class Phase(enum.Enum):
    """Where a request's read is. PENDING phases hold back its bootstrap."""

    GREETING = "greeting"
    OFFERED = "offered"
    SUBMITTED = "submitted"
    READING = "reading"
    SETTLED = "settled"


@dataclass(eq=False)
class Chunk:
    """One granted claim on its way: read (unless it is held in memory), then pushed."""

    read: DecodeRead
    grant: Grant
    deadline_s: float
    """On this engine's clock. The prefill engine granted earlier, so its lease ends before this."""
    reading: bool = True
    """A storage read may be writing into this engine's host pages."""
    good_pages: int = 0
    read_bytes: int = 0


@dataclass(eq=False)
class DecodeRead:
    """One request's read on the decode engine."""

    room: int
    handle: Hashable
    endpoint: str | None
    match_pages: int
    held_slots: Sequence[int]
    """Host slots of the leading pages held in host memory, locked there until the read is over."""
    held_hashes: Sequence[str]
    deadline_s: float
    heard_s: float
    phase: Phase = Phase.GREETING
    offer: Offer | None = None
    prefetch: Prefetch | None = None
    ended: str | None = None
    """Why no more is claimed; None while more may come."""
    granted: deque[Chunk] = field(default_factory=deque)
    requested: dict[int, float] = field(default_factory=dict)
    """Claims without an answer, by request id, and when they were sent."""
    busy: list[Chunk] = field(default_factory=list)
    """Chunks that a thread reads or pushes."""
    landed: set[int] = field(default_factory=set)
    """Pages (absolute) that this engine has read into its own host pages."""
    memory_left: int = 0
    parked_until_s: float = 0.0
    claim_again_s: float = 0.0

    @property
    def attempt(self) -> int:
        return self.offer.attempt if self.offer is not None else 0

    @property
    def over(self) -> bool:
        """Nothing of this read will touch host memory any more."""
        return self.ended is not None and not self.granted and not self.busy

    def kept_pages(self) -> int:
        """Leading pages of the prefetch that are in its host pages."""
        if self.prefetch is None:
            return 0
        page = self.prefetch.first_page
        while page in self.landed:
            page += 1
        return page - self.prefetch.first_page


class DecodeReads:
    """All reads of one decode engine.

    Args:
        send: ``send(endpoint, message)``; thread-safe and never blocks.
        lookup: ``lookup(read)`` finds the prefill engine's endpoint off this thread and calls :meth:`greet` with it.
    """

    def __init__(
        self,
        *,
        config: DualPathConfig,
        pages: HostPages,
        engine: str,
        rank: int,
        send: Callable[[str, Message], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.pages = pages
        self.engine = engine
        self.rank = rank
        self.send = send
        self.clock = clock
        self.rate = Rate()
        self.lock = threading.Condition()
        self.reads: OrderedDict[int, DecodeRead] = OrderedDict()
        self.on_silence: Callable[[str], None] = lambda endpoint: None
        self._by_prefetch: dict[int, DecodeRead] = {}
        self._requests = 0
        self._stopped = False

    # -- scheduler thread ----------------------------------------------------------------------------------------

    def accepted(
        self, room: int, handle: Hashable, *, match_pages: int, held_slots: Sequence[int], held_hashes: Sequence[str]
    ) -> DecodeRead:
        """The decode queue has accepted a request. Its bootstrap is held back until the read has settled."""
        now = self.clock()
        read = DecodeRead(
            room=room,
            handle=handle,
            endpoint=None,
            match_pages=match_pages,
            held_slots=held_slots,
            held_hashes=held_hashes,
            deadline_s=now + self.config.read_deadline_s,
            heard_s=now,
        )
        with self.lock:
            self.reads[room] = read
        return read

    def pending(self, room: int) -> bool:
        """True while the request's bootstrap must wait for its read."""
        with self.lock:
            read = self.reads.get(room)
            return read is not None and read.phase is not Phase.SETTLED

    def take_offers(self) -> list[DecodeRead]:
        """Reads whose offer has come and for which SGLang has no prefetch yet."""
        with self.lock:
            now = self.clock()
            return [read for read in self.reads.values() if read.phase is Phase.OFFERED and now >= read.parked_until_s]

    def source_slots(self, chunk: Chunk) -> list[int]:
        """This engine's host slots of a chunk's pages."""
        first, end = chunk.grant.first_page, chunk.grant.first_page + len(chunk.grant.slots)
        with self.lock:
            read = chunk.read
            if chunk.grant.memory:
                return list(read.held_slots[first:end])
            assert read.prefetch is not None
            start = (first - read.prefetch.first_page) * self.pages.page_tokens
            stop = (end - read.prefetch.first_page) * self.pages.page_tokens
            return self.pages.slots_of(read.prefetch.host_indices[start:stop])

    def without_prefetch(self, read: DecodeRead, why: str | None = None) -> None:
        """Nothing is to be read from storage here; what is held in memory is pushed while the request goes on."""
        with self.lock:
            if why is not None:
                self._decline(read, why)
            self._settle(read)

    def submitted(self, read: DecodeRead) -> None:
        """SGLang accepted a prefetch of the offered pages."""
        with self.lock:
            if read.phase is Phase.OFFERED:
                read.phase = Phase.SUBMITTED

    def parked(self, read: DecodeRead, delay_s: float) -> None:
        """SGLang has no room for the prefetch now; :meth:`take_offers` names the read again after ``delay_s``."""
        with self.lock:
            if read.phase in (Phase.OFFERED, Phase.SUBMITTED):
                read.phase = Phase.OFFERED
                read.parked_until_s = self.clock() + delay_s
                if read.ended is not None:
                    self._settle(read)

    def opened(self, read: DecodeRead, prefetch: Prefetch) -> None:
        """Host pages are allocated: claims may go out."""
        with self.lock:
            if read.prefetch is None:
                read.prefetch = prefetch
                read.phase = Phase.READING
                self._by_prefetch[id(prefetch)] = read
                self._pump()
                self.lock.notify_all()

    def settled(self, read: DecodeRead) -> None:
        """SGLang has inserted what the prefetch brought: the request may go on."""
        with self.lock:
            self._settle(read)

    def gone(self, room: int) -> DecodeRead | None:
        """The request has left this engine; returns its read so that the caller can release what it locked."""
        with self.lock:
            read = self.reads.get(room)
            if read is None:
                return None
            if read.ended is None:
                self._say(read, Bye(room, read.attempt))
            self._end(read, "request_gone")
            self._settle(read)
            return read

    def over(self) -> list[DecodeRead]:
        """Settled reads that touch no host memory any more, forgotten by this call; unlock what they held."""
        with self.lock:
            done = [read for read in self.reads.values() if read.phase is Phase.SETTLED and read.over]
            for read in done:
                del self.reads[read.room]
            return done

    def abandon_all(self) -> None:
        """SGLang clears its pools: end every read; waits for storage reads in flight, and for pushes in their lease."""
        with self.lock:
            for read in list(self.reads.values()):
                self._end(read, "flushed")
                self._await_busy(read)
                self._settle(read)

    # -- SGLang's prefetch IO thread -----------------------------------------------------------------------------

    def wait(self, prefetch: Prefetch, first: int, count: int) -> int:
        """Block until pages ``first .. first + count`` (relative) are here or no more come; return the leading ones."""
        with self.lock:
            read = self._by_prefetch.get(id(prefetch))
            if read is None:
                return 0
            wanted = range(prefetch.first_page + first, prefetch.first_page + first + count)
            while not all(page in read.landed for page in wanted):
                if prefetch.is_cancelled() or self._stopped:
                    self._end(read, "cancelled")
                if read.over:
                    break
                self.lock.wait(_CANCEL_POLL_S)
            return max(0, min(count, read.kept_pages() - first))

    def finish(self, prefetch: Prefetch) -> None:
        """The transfer is over and SGLang is about to insert or free its pages: see that nothing uses them.

        A push in progress reads from them; once its lease has ended the prefill engine no longer accepts its bytes.
        """
        with self.lock:
            read = self._by_prefetch.pop(id(prefetch), None)
            if read is not None:
                self._end(read, "finished")
                self._await_busy(read)

    def _await_busy(self, read: DecodeRead) -> None:
        while any(chunk.reading or chunk.deadline_s > self.clock() for chunk in read.busy):
            self.lock.wait(_CANCEL_POLL_S)

    # -- reader and pushers --------------------------------------------------------------------------------------

    def next_chunk(self, timeout_s: float) -> Chunk | None:
        """The next granted chunk, oldest read first; waits up to ``timeout_s``."""
        with self.lock:
            chunk = self._pop_chunk()
            if chunk is None and not self._stopped:
                self._pump()
                self.lock.wait(timeout_s)
                chunk = self._pop_chunk()
            return chunk

    def _pop_chunk(self) -> Chunk | None:
        for read in self.reads.values():
            while read.granted:
                chunk = read.granted.popleft()
                if chunk.deadline_s <= self.clock():
                    self._say(read, Fail(read.room, read.attempt, chunk.grant.claim_id, "lease over before the read"))
                    continue
                if chunk.grant.memory:
                    chunk.reading = False
                    chunk.good_pages = len(chunk.grant.slots)
                read.busy.append(chunk)
                self._pump()
                return chunk
        return None

    def was_read(self, chunk: Chunk, good_pages: int, seconds: float) -> None:
        """A storage read ended with so many good pages; they are this engine's to keep."""
        with self.lock:
            chunk.reading = False
            chunk.good_pages = good_pages
            chunk.read_bytes = good_pages * self.pages.page_bytes
            first = chunk.grant.first_page
            chunk.read.landed.update(range(first, first + good_pages))
            self.rate.add(chunk.read_bytes, seconds)
            if good_pages < len(chunk.grant.slots):
                metrics.FALLBACKS.add(reason="decode_read_error")
                self._end(chunk.read, "read_error")
            self.lock.notify_all()
        metrics.READ_BYTES.add(chunk.read_bytes, engine_role="decode", path="decode")

    def pushed(self, chunk: Chunk, error: str | None) -> None:
        """The last word on a chunk: its push ended, or was not tried (``error``)."""
        read = chunk.read
        with self.lock:
            if chunk in read.busy:
                read.busy.remove(chunk)
            if error is None:
                size_bytes = chunk.good_pages * self.pages.page_bytes
                metrics.PUSHED_BYTES.add(size_bytes, engine_role="decode")
                self._say(
                    read,
                    Done(
                        room=read.room,
                        attempt=read.attempt,
                        claim_id=chunk.grant.claim_id,
                        good_pages=chunk.good_pages,
                        read_bytes=chunk.read_bytes,
                        pushed_bytes=size_bytes,
                        queued_read_bytes=self._queued_bytes(),
                        read_bytes_per_s=self.rate.bytes_per_s,
                    ),
                )
            else:
                metrics.FALLBACKS.add(reason="push_failed")
                logger.warning("Push for room %s failed: %s", read.room, error)
                self._say(read, Fail(read.room, read.attempt, chunk.grant.claim_id, clip(error)))
                self._end(read, "push_failed")
            self._pump()
            self.lock.notify_all()

    # -- control thread ------------------------------------------------------------------------------------------

    def greet(self, read: DecodeRead, endpoint: str | None) -> None:
        """The prefill engine's control endpoint was found (None: it has none). Runs on the lookup thread."""
        with self.lock:
            if read.phase is not Phase.GREETING:
                return
            if endpoint is None:
                metrics.FALLBACKS.add(reason="prefill_without_dualpath")
                self._end(read, "no_endpoint")
                self._settle(read)
                return
            read.endpoint = endpoint
            read.heard_s = self.clock()
            self._say(
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
                    tp_size=1,
                    match_pages=read.match_pages,
                    held_end_page=len(read.held_slots),
                    queued_read_bytes=self._queued_bytes(),
                    read_bytes_per_s=self.rate.bytes_per_s,
                ),
            )

    def handle(self, endpoint: str, message: Message) -> None:
        """One message of a prefill engine."""
        with self.lock:
            read = self.reads.get(message.room)
            if read is None or read.endpoint != endpoint:
                self._answer_stranger(endpoint, message)
                return
            read.heard_s = self.clock()
            match message:
                case Offer():
                    self._offer(read, message)
                case Grant():
                    self._grant(read, message)
                case Refuse():
                    self._refuse(read, message)
                case Cancel():
                    self._cancel(read, message)
                case NoOffer():
                    metrics.OFFERS.add(outcome=f"got_none_{message.reason.value}")
                    self._end(read, f"no_offer_{message.reason.value}")
                    if read.phase in (Phase.GREETING, Phase.OFFERED):
                        self._settle(read)
                case Queued():
                    pass
                case _:
                    metrics.CONTROL_ERRORS.add(kind="unexpected_message")
            self.lock.notify_all()

    def tick(self, now: float) -> None:
        """End reads whose peer is silent or whose deadline has passed."""
        del now
        with self.lock:
            clock = self.clock()
            for read in list(self.reads.values()):
                if read.ended is not None:
                    continue
                silent = read.endpoint is not None and clock - read.heard_s > self.config.hello_silence_s
                if silent and (read.phase is Phase.GREETING or read.requested):
                    metrics.FALLBACKS.add(reason="prefill_silent")
                    logger.warning("Prefill engine at %s is silent for room %s.", read.endpoint, read.room)
                    if read.endpoint is not None:
                        self.on_silence(read.endpoint)
                    self._give_up(read, "peer_silent")
                elif clock >= read.deadline_s:
                    metrics.FALLBACKS.add(reason="read_deadline")
                    self._give_up(read, "deadline")
            self._pump()

    # -- inside, lock held ---------------------------------------------------------------------------------------

    def _give_up(self, read: DecodeRead, why: str) -> None:
        self._say(read, Bye(read.room, read.attempt))
        self._end(read, why)
        if read.phase in (Phase.GREETING, Phase.OFFERED):
            self._settle(read)

    def _offer(self, read: DecodeRead, offer: Offer) -> None:
        if read.phase is not Phase.GREETING or read.ended is not None:
            return
        held_end = min(len(read.held_slots), offer.end_page)
        if read.match_pages < offer.first_page:
            self._decline(read, "prefix_gap")
            self._settle(read)
            return
        if offer.end_page <= len(read.held_hashes) and read.held_hashes[offer.end_page - 1] != offer.end_hash:
            metrics.FALLBACKS.add(reason="prompt_differs")
            self._decline(read, "prompt_differs")
            self._settle(read)
            return
        read.offer = offer
        read.phase = Phase.OFFERED
        read.memory_left = max(0, held_end - offer.first_page)
        metrics.OFFERS.add(outcome="got")
        self._pump()

    def _decline(self, read: DecodeRead, why: str) -> None:
        if read.offer is not None or why in ("prefix_gap", "prompt_differs"):
            self._say(read, Decline(read.room, read.attempt, why))
        self._end(read, why)

    def _grant(self, read: DecodeRead, grant: Grant) -> None:
        if read.requested.pop(grant.request_id, None) is None or read.offer is None:
            metrics.CONTROL_ERRORS.add(kind="grant_without_claim")
            self._say(read, Fail(read.room, grant.attempt, grant.claim_id, "no such claim"))
            return
        chunk = Chunk(read, grant, self.clock() + min(grant.lease_s, self.config.lease_s))
        problem = self._out_of_range(read, grant)
        if problem is not None:
            metrics.CONTROL_ERRORS.add(kind="grant_out_of_range")
            self._say(read, Fail(read.room, read.attempt, grant.claim_id, problem))
            self._end(read, "bad_grant")
            return
        if read.ended is not None:
            self._say(read, Cancelled(read.room, read.attempt, grant.claim_id))
            return
        if grant.memory:
            read.memory_left -= len(grant.slots)
        read.granted.append(chunk)

    def _out_of_range(self, read: DecodeRead, grant: Grant) -> str | None:
        offer = read.offer
        assert offer is not None
        end = grant.first_page + len(grant.slots)
        if grant.attempt != offer.attempt or grant.first_page < offer.first_page or end > offer.end_page:
            return "the grant lies outside the offer"
        if max(grant.slots) >= offer.target.slots:
            return "the grant names a slot outside the host pool"
        if grant.memory:
            return None if end <= len(read.held_slots) else "the grant names pages that are not held"
        if read.prefetch is None:
            return "no host pages yet"
        if grant.first_page < read.prefetch.first_page or end > read.prefetch.end_page:
            return "the grant lies outside the prefetch"
        return None

    def _refuse(self, read: DecodeRead, refuse: Refuse) -> None:
        if read.requested.pop(refuse.request_id, None) is None:
            return
        if refuse.retry:
            read.claim_again_s = self.clock() + refuse.retry_after_s
        else:
            self._end(read, f"refused_{refuse.reason}")

    def _cancel(self, read: DecodeRead, cancel: Cancel) -> None:
        if cancel.attempt != read.attempt:
            return
        kept: deque[Chunk] = deque()
        found = False
        for chunk in read.granted:
            if cancel.claim_id in (None, chunk.grant.claim_id):
                found = True
                self._say(read, Cancelled(read.room, read.attempt, chunk.grant.claim_id))
            else:
                kept.append(chunk)
        read.granted = kept
        in_hand = any(chunk.grant.claim_id == cancel.claim_id for chunk in read.busy)
        if cancel.claim_id is not None and not found and not in_hand:
            # Its last word was said, and lost or late: say it again.
            self._say(read, Cancelled(read.room, read.attempt, cancel.claim_id))
        self._end(read, "cancelled_by_prefill")

    def _answer_stranger(self, endpoint: str, message: Message) -> None:
        """A read that this engine no longer knows writes nothing any more: say so, or the other side waits for it."""
        if isinstance(message, Cancel | Grant):
            if message.claim_id is not None:
                self.send(endpoint, Cancelled(message.room, message.attempt, message.claim_id))
        elif isinstance(message, Offer):
            self.send(endpoint, Bye(message.room, message.attempt))

    def _end(self, read: DecodeRead, why: str) -> None:
        if read.ended is None:
            read.ended = why
            for chunk in read.granted:
                self._say(read, Cancelled(read.room, read.attempt, chunk.grant.claim_id))
            read.granted.clear()
            read.requested.clear()
            self.lock.notify_all()

    def _settle(self, read: DecodeRead) -> None:
        if read.phase is Phase.SETTLED:
            return
        read.phase = Phase.SETTLED
        if read.offer is not None and read.ended is None and read.memory_left <= 0:
            self._end(read, "settled")
        if read.offer is not None and read.ended is not None:
            self._say(read, Settled(read.room, read.attempt, read.kept_pages()))
        self.lock.notify_all()

    def _pump(self) -> None:
        """Ask for the next chunks, oldest read first, up to ``claims_in_flight`` that are not yet read."""
        now = self.clock()
        budget = self.config.claims_in_flight
        for read in self.reads.values():
            budget -= len(read.requested) + len(read.granted) + sum(chunk.reading for chunk in read.busy)
        for read in self.reads.values():
            if budget <= 0:
                return
            while budget > 0 and self._may_claim(read, now):
                self._requests += 1
                assert read.offer is not None
                read.requested[self._requests] = now
                self._say(read, Claim(read.room, read.attempt, self._requests, self._claim_pages(read.offer)))
                budget -= 1

    def _claim_pages(self, offer: Offer) -> int:
        """Pages to ask for: what is offered, but no more than this engine's NIC reads in a small part of the lease.

        A chunk waits for the one before it, is read and pushed, all within its lease; and where the readers meet, the
        faster one waits for the slower one's last chunk.
        """
        rate = self.rate.bytes_per_s or _FIRST_CHUNK_BYTES / (offer.lease_s * _LEASE_SHARE)
        return max(1, min(offer.chunk_pages, int(rate * offer.lease_s * _LEASE_SHARE / self.pages.page_bytes)))

    def _may_claim(self, read: DecodeRead, now: float) -> bool:
        if read.ended is not None or read.offer is None or now < read.claim_again_s:
            return False
        if read.prefetch is not None:
            return True
        # Without host pages only what is held in memory can be served, one claim at a time: a second could be granted
        # pages that must be read.
        return read.memory_left > 0 and not read.requested

    def _queued_bytes(self) -> int:
        pages = 0
        for read in self.reads.values():
            if read.ended is None and read.offer is not None and read.prefetch is not None:
                pages += max(0, read.prefetch.pages - len(read.landed))
        return pages * self.pages.page_bytes

    def _say(self, read: DecodeRead, message: Message) -> None:
        if read.endpoint is not None:
            self.send(read.endpoint, message)

    def stop(self) -> None:
        with self.lock:
            self._stopped = True
            self.lock.notify_all()
