"""The prefill engine's side of every read: ledgers, its own readers, and what decode engines are granted.

Threads, and what each may do:

* scheduler: ``arrived``, ``parked``, ``declined``, ``passed_over``, ``opened``, ``gone``, ``abandon_all``; never waits;
* SGLang's prefetch IO thread: ``wait`` and ``finish``; waits for pages, until they land or a deadline passes;
* SGLang's hit query thread: ``held_pages``; waits a moment for the first message of a decode engine;
* own reader threads: ``next_own_claim`` and ``own_done``;
* the control thread: everything that :class:`~sglang_dualpath.reader.offers.OfferDesk` does.

One lock guards the ledgers. No I/O happens while it is held.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable

from sglang_dualpath import metrics
from sglang_dualpath.config import DualPathConfig
from sglang_dualpath.ledger import End, Expired, Grant, Ledger, Reserve, Share
from sglang_dualpath.protocol import MAX_GRANT_PAGES, NoOfferReason
from sglang_dualpath.reader.pool import HostPages
from sglang_dualpath.reader.prefetch import Prefetch, Rate
from sglang_dualpath.reader.prefill_read import Late, PrefillRead, Room
from sglang_dualpath.reader.turns import in_turn

__all__ = ["OWN", "PrefillRead", "PrefillReads", "Room"]

logger = logging.getLogger(__name__)

# A blank: no engine can have this name.
OWN = "own reader"
# Rooms that ended are remembered so that a late HELLO gets an answer; a router does not replay older ones.
_REMEMBERED_ROOMS = 4096
# How often a waiting thread looks whether SGLang cancelled its operation, which wakes nobody.
_CANCEL_POLL_S = 0.05
# Both servers get a request from the router at about the same time; what differs is the tokenizer's queue.
_HELLO_GRACE_S = 0.05
# After so many requests without a HELLO the decode servers are taken to run without DualPath.
_SILENT_REQUESTS = 4


class PrefillReads:
    """All reads of one prefill engine.

    Args:
        reserve: the spare pages that back what decode engines are granted.
        lock: guards the ledgers and the reserve; one of their own if None.

    ``planner``, ``cancel`` and ``answer`` are set by :class:`~sglang_dualpath.reader.offers.OfferDesk` and called with
    the lock held.
    """

    def __init__(
        self,
        *,
        config: DualPathConfig,
        pages: HostPages,
        reserve: Reserve,
        lock: threading.Condition | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.pages = pages
        self.reserve = reserve
        self.clock = clock
        self.chunk_pages = min(MAX_GRANT_PAGES, max(1, config.chunk_bytes // pages.page_bytes))
        self.rate = Rate()
        self.decode_rates: dict[str, float] = {}  # bytes per second from storage, by engine
        self.lock = lock or threading.Condition()
        self.rooms: OrderedDict[int, Room] = OrderedDict()
        self.reads: OrderedDict[int, PrefillRead] = OrderedDict()
        self.by_number: dict[tuple[int | None, int], PrefillRead] = {}
        self.late: dict[tuple[int, int, int], Late] = {}
        """By room, attempt and claim id."""
        self.heard_s: dict[bytes, float] = {}
        """When a decode engine last said anything, by peer."""
        self.planner: Callable[[PrefillRead], None] = lambda read: None
        self.cancel: Callable[[PrefillRead, Iterable[Expired]], None] = lambda read, expired: None
        self.answer: Callable[[int, Room], None] = lambda number, room: None
        self._room_of: dict[Hashable, int] = {}
        self.asks_decode = True
        """The policy may give the decode engine a share."""
        self.silent_requests = 0
        """Requests in a row of which no decode engine spoke."""
        self._stopped = False

    # -- scheduler thread ----------------------------------------------------------------------------------------

    def arrived(self, room: int, handle: Hashable) -> None:
        """SGLang is about to look for this request's pages (again, with a new attempt, if it did so before)."""
        with self.lock:
            state = self.room(room)
            state.arrived = True
            state.handles.add(handle)
            state.closed = None
            self._room_of[handle] = room

    def declined(self, handle: Hashable, reason: NoOfferReason) -> None:
        """There will be no read for this request; a decode engine that asks is told so."""
        with self.lock:
            room = self._room_of.get(handle)
            if room is not None:
                self._close_room(room, reason)

    def parked(self, handle: Hashable, reason: str) -> None:
        """SGLang has no room for this request's prefetch now, and will be asked again. Counted once per request."""
        with self.lock:
            number = self._room_of.get(handle)
            if number is not None and not self.room(number).parked:
                self.room(number).parked = True
                metrics.PARKED.add(engine_role="prefill", reason=reason)
                logger.info("DualPath read of room %d waits (%s).", number, reason)

    def passed_over(self, handle: Hashable) -> None:
        """SGLang has looked at this request and asked storage for nothing; a decode engine that asks is told so.

        It does so when the pages before the missing ones are in device memory alone.
        """
        with self.lock:
            room = self._room_of.get(handle)
            if room is not None and self.room(room).closed is None:
                self._close_room(room, NoOfferReason.NOT_ASKED)

    def gone(self, handle: Hashable) -> None:
        """The request has left this engine. Its read ends by itself: SGLang cancels the operation."""
        with self.lock:
            room = self._room_of.pop(handle, None)
            if room is not None:
                self.room(room).handles.discard(handle)
                self._close_room(room, NoOfferReason.CLOSED)

    def opened(self, prefetch: Prefetch) -> PrefillRead | None:
        """Host pages are allocated: reading may start. Idempotent; None once the prefetch is over."""
        with self.lock:
            known = self.reads.get(id(prefetch))
            if known is not None or prefetch.over:
                return known
            now = self.clock()
            number = self._room_of.get(prefetch.handle)
            room = self.room(number) if number is not None else None
            read = PrefillRead(
                room=number,
                attempt=room.attempts if room else 0,
                prefetch=prefetch,
                ledger=Ledger(
                    first_page=prefetch.first_page,
                    slots=self.pages.slots_of(prefetch.host_indices),
                    storage_end_page=prefetch.first_page + prefetch.stored_pages,
                    reserve=self.reserve,
                    chunk_pages=self.chunk_pages,
                ),
                opened_s=now,
                deadline_s=now + self.config.read_deadline_s,
            )
            read.ledger.join(OWN, Share(End.BACK), local=True)
            self.reads[read.key] = read
            self.by_number[read.number] = read
            if room is None:
                read.planned = True
            else:
                room.attempts += 1
                room.read = read
                room.closed = None
                self.planner(read)
            self.lock.notify_all()
            return read

    def abandon_all(self) -> None:
        """SGLang clears its pools: every read ends now, and whatever may still be written to is kept out of the pool.

        Waits for own reads in flight, as SGLang itself waits for its storage threads.
        """
        with self.lock:
            for read in list(self.reads.values()):
                self._close(read)
            self.rooms.clear()
            self._room_of.clear()

    # -- SGLang's storage threads --------------------------------------------------------------------------------

    def wait(self, prefetch: Prefetch, first: int, count: int) -> int:
        """Block until pages ``first .. first + count`` (relative) have landed; return how many leading ones have.

        Returns short when nobody can read the next page, the operation is cancelled or the read's deadline has passed.
        """
        read = self.opened(prefetch)
        if read is None:
            return 0
        with self.lock:
            started = self.clock()
            while not read.closed and not read.ledger.settled_through(first + count):
                if prefetch.is_cancelled() or self._stopped:
                    break
                if self.clock() >= read.deadline_s:
                    self.fallback("read_deadline", read)
                    break
                self._leave_if_stalled(read, started)
                self.lock.wait(_CANCEL_POLL_S)
            landed = max(0, min(count, read.ledger.landed_prefix() - first))
            if landed < count:
                self._close(read)
            return landed

    def _leave_if_stalled(self, read: PrefillRead, started_s: float) -> None:
        """Do not hold up later reads for pages that only a decode engine could bring, if it does not ask for them.

        Called for the read that SGLang's thread waits for. A peer that has said nothing at all for a lease is taken
        for frozen. One that lives may have older reads to serve, which are over here, too, when this one's turn comes.
        """
        if read.decode is None or not read.ledger.counts_on(read.decode) or read.ledger.open_grants():
            return
        now = self.clock()
        heard_s = max(read.progress_s, self.heard_s.get(read.peer, 0.0)) if read.peer is not None else 0.0
        patience_s = max(read.progress_s + self.config.hello_silence_s, started_s + self.config.lease_s)
        if now >= min(heard_s + self.config.lease_s, patience_s):
            self.fallback("decode_silent", read)
            read.ledger.leave(read.decode, now_s=now)
            read.decode = None
            self.lock.notify_all()

    def finish(self, prefetch: Prefetch) -> None:
        """SGLang's transfer of this operation is over: its pages are about to be inserted or freed."""
        with self.lock:
            prefetch.over = True
            read = self.reads.get(id(prefetch))
            if read is not None:
                self._close(read)

    def held_pages(self, handle: Hashable, reached: int, possible: int) -> int:
        """Leading pages of the prompt that the request's decode engine holds in host memory, 0 if unknown.

        Waits for its first message when storage holds only ``reached`` of ``possible`` pages, unless decode engines
        have not been heard of lately (a decode server without the flag must not cost every request a wait).
        """
        with self.lock:
            number = self._room_of.get(handle)
            if number is None or reached >= possible or not self.asks_decode:
                return 0
            until = self.clock() + _HELLO_GRACE_S
            while (state := self.rooms.get(number)) is not None and state.hello is None and not state.alone:
                left = until - self.clock()
                if left <= 0 or self._deaf or self._stopped:
                    self.silent_requests += 1
                    return 0
                self.lock.wait(left)
            if state is None or state.hello is None:
                return 0
            return state.hello.held_end_page

    @property
    def _deaf(self) -> bool:
        return self.silent_requests >= _SILENT_REQUESTS

    @property
    def grace_s(self) -> float:
        """How long reading waits for a HELLO, lest it reads what the decode engine holds: not at all if none speaks."""
        return 0.0 if self._deaf else _HELLO_GRACE_S

    @property
    def hello_wait_s(self) -> float:
        """How long a policy that wants to know the decode engine waits for its HELLO: less when none speaks."""
        return _HELLO_GRACE_S if self._deaf else self.config.hello_silence_s

    # -- own readers ---------------------------------------------------------------------------------------------

    def next_own_claim(self, timeout_s: float) -> tuple[PrefillRead, Grant] | None:
        """The next chunk for an own reader, of the read whose turn it is; waits up to ``timeout_s`` for one."""
        with self.lock:
            found = self._own_claim()
            if found is None and not self._stopped:
                self.lock.wait(timeout_s)
                found = self._own_claim()
            return found

    def _own_claim(self) -> tuple[PrefillRead, Grant] | None:
        now = self.clock()
        for read in in_turn(self.reads.values(), self.decode_rates, self.rate.bytes_per_s, now_s=now):
            answer = read.ledger.claim(OWN, max_pages=None, now_s=now)
            if isinstance(answer, Grant):
                return read, answer
        return None

    def own_done(self, read: PrefillRead, grant: Grant, good_pages: int, seconds: float) -> None:
        """An own reader's last word on a chunk."""
        size_bytes = good_pages * self.pages.page_bytes
        with self.lock:
            read.ledger.land(grant.claim_id, good_pages=good_pages, now_s=self.clock())
            if good_pages:
                self.rate.add(size_bytes, seconds, ended_s=self.clock())
            if good_pages < grant.pages and not read.closed and not read.prefetch.is_cancelled():
                self.fallback("prefill_read_error", read)
            self.lock.notify_all()
        metrics.READ_BYTES.add(size_bytes, engine_role="prefill", path="prefill")

    # -- shared with the control thread, lock held -----------------------------------------------------------------

    def queued_read_bytes(self) -> int:
        """Bytes that own readers may have to read, not counting what decode engines have claimed. Lock held."""
        return self._unclaimed_bytes(read for read in self.reads.values() if read.own_share or read.decode is None)

    def offered_read_bytes(self, engine: str) -> int:
        """Bytes that a decode engine was offered here and that nobody has claimed. Lock held."""
        return self._unclaimed_bytes(read for read in self.reads.values() if read.decode == engine)

    def _unclaimed_bytes(self, reads: Iterable[PrefillRead]) -> int:
        spans = (read.ledger.span_left for read in reads)
        return sum(end - first for first, end in spans) * self.pages.page_bytes

    def take_back(self, read: PrefillRead, expired: Iterable[Expired]) -> None:
        """Claims were taken from their writer: its pages go to spares from now on. Lock held."""
        expired = list(expired)
        for one in expired:
            read.prefetch.move(self.pages, one.swap.first_page, one.swap.new_slots)
            read.claims.pop(one.grant.claim_id, None)
            if read.room is not None:
                self.late[(read.room, read.attempt, one.grant.claim_id)] = Late(
                    read.peer, read.ledger, self.clock() + self.cancel_every_s
                )
        if expired:
            self.cancel(read, expired)
            self.lock.notify_all()

    @property
    def cancel_every_s(self) -> float:
        """How often a writer is asked again for its last word."""
        return self.config.hello_silence_s / 3

    def fallback(self, reason: str, read: PrefillRead) -> None:
        """Count and log that a read went on without something it had counted on."""
        metrics.FALLBACKS.add(reason=reason)
        logger.warning("DualPath falls back (%s) for room %s, attempt %d.", reason, read.room, read.attempt)

    def room(self, number: int) -> Room:
        """The state of a room, made when it is new. Lock held."""
        state = self.rooms.get(number)
        if state is None:
            state = self.rooms[number] = Room(spoke_s=self.clock())
            while len(self.rooms) > _REMEMBERED_ROOMS:
                oldest, room = next(iter(self.rooms.items()))
                if room.read is not None and not room.read.closed:
                    break
                del self.rooms[oldest]
                for handle in room.handles:
                    if self._room_of.get(handle) == oldest:
                        del self._room_of[handle]
        return state

    def _close_room(self, number: int, reason: NoOfferReason) -> None:
        state = self.room(number)
        state.closed = reason
        if state.hello is not None and (state.read is None or state.read.closed):
            self.answer(number, state)

    def _close(self, read: PrefillRead) -> None:
        if not read.closed:
            # Over for good: SGLang may name it until its transfer ends, which must not open it again.
            read.closed = read.prefetch.over = True
            # In this order: after close() nobody is granted anything, so the claims that are open now are the last.
            self.take_back(read, read.ledger.close(now_s=self.clock()))
        while read.ledger.open_local_claims():
            self.lock.wait(_CANCEL_POLL_S)
        if self.reads.pop(read.key, None) is None:
            return
        self.by_number.pop(read.number, None)
        count = read.ledger.statistics()
        whole = read.ledger.landed_prefix() == read.prefetch.pages
        others = sum(pages for reader, pages in count.landed_by_reader.items() if reader != OWN)
        own = count.landed_by_reader.get(OWN, 0)
        if whole and not (read.planned or read.unheard or read.attempt or self._was_greeted(read)):
            # Its own reader was done before the decode engine spoke, or it has none that speaks.
            self.fallback("no_hello", read)
        outcome = ("split" if own and others else "decode" if others else "prefill") if whole else "short"
        metrics.REQUESTS.add(outcome=outcome)
        logger.info(
            "DualPath read of room %s, attempt %d: %d pages, %d by prefill, %d by decode (%d from memory), %s, %.3f s",
            read.room, read.attempt, read.prefetch.pages, own, others, count.memory_pages, outcome,
            self.clock() - read.opened_s,
        )  # fmt: skip
        if read.room is not None:
            state = self.room(read.room)
            if state.read is read:
                # Rooms are remembered for long; a read has its prompt's hashes and host indices.
                state.read = None
                self._close_room(read.room, NoOfferReason.CLOSED)
        self.lock.notify_all()

    def _was_greeted(self, read: PrefillRead) -> bool:
        """Its decode engine spoke: who reads was then only not decided yet, by another rank."""
        room = self.rooms.get(read.room) if read.room is not None else None
        return room is not None and room.hello is not None

    def stop(self) -> None:
        with self.lock:
            self._stopped = True
            self.lock.notify_all()
