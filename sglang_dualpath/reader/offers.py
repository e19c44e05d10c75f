"""What decode engines ask of a prefill engine, answered on its control thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from sglang_dualpath import __version__, metrics
from sglang_dualpath.ledger import Expired, Grant, RefusalReason, Share, Source
from sglang_dualpath.ledger.types import End
from sglang_dualpath.policy import BalancingPolicy, ClusterView, EngineView, ReadPlan, ReadRequest, Role, validate_plan
from sglang_dualpath.policy.types import prefill_alone
from sglang_dualpath.protocol import (
    PROTOCOL_VERSION,
    Bye,
    Cancel,
    Cancelled,
    Claim,
    Decline,
    Done,
    Fail,
    Hello,
    Message,
    NoOffer,
    NoOfferReason,
    Offer,
    Plane,
    Queued,
    Refuse,
    Settled,
    Target,
)
from sglang_dualpath.protocol import Grant as GrantMessage
from sglang_dualpath.reader.prefill import OWN, PrefillRead, PrefillReads, Room

logger = logging.getLogger(__name__)

# Refused claims ask again after this: half of what a 4 MiB chunk takes on a 2 GB/s link, and a few control round trips.
_RETRY_AFTER_S = 0.01
# A decode server often gets a request before the prefill server does; a router that never sends it there is at fault.
_UNKNOWN_ROOM_S = 10.0
_AWAITED = "awaited"


class OfferDesk:
    """Offers shares of reads, grants claims, and takes them back when their lease ends.

    Args:
        reads: the prefill engine's reads.
        policy: decides who may claim.
        engine: this engine's id, as policies see it.
        session: its transfer session, where decode engines push to.
        send: ``send(peer, message)``; thread-safe and never blocks.
    """

    def __init__(
        self,
        reads: PrefillReads,
        *,
        policy: BalancingPolicy,
        engine: str,
        session: str,
        send: Callable[[bytes, Message], object],
    ) -> None:
        self._reads = reads
        self._policy = policy
        self._engine = engine
        self._send = send
        self._views: dict[str, EngineView] = {}
        pool = reads.pages
        self._target = Target(session=session, planes=tuple(Plane(*plane) for plane in pool.planes), slots=pool.slots)
        self._plane_bytes = tuple(plane.page_bytes for plane in pool.planes)
        reads.planner = self._plan
        reads.cancel = self._say_cancel
        reads.answer = self._answer

    # -- messages, on the control thread ---------------------------------------------------------------------------

    def handle(self, peer: bytes, message: Message) -> None:
        """One message of a decode engine."""
        with self._reads.lock:
            match message:
                case Hello():
                    self._hello(peer, message)
                case Claim():
                    self._claim(peer, message)
                case Done():
                    self._done(peer, message)
                case Fail() | Cancelled():
                    self._failed(peer, message)
                case Decline() | Settled() | Bye():
                    self._left(peer, message)
                case _:
                    metrics.CONTROL_ERRORS.add(kind="unexpected_message")

    def gone(self, peer: bytes) -> None:
        """The peer's connection was closed by its kernel: its process is gone and writes no more."""
        with self._reads.lock:
            now = self._reads.clock()
            for read in list(self._reads.reads.values()):
                if read.peer == peer and read.decode is not None:
                    self._reads.take_back(read, read.ledger.revoke(read.decode, now_s=now))
                    read.peer = None
                    self._reads.fallback("decode_gone", read)
            for key, (writer, ledger) in list(self._reads.late.items()):
                if writer == peer:
                    ledger.settle_late(key[2])
                    del self._reads.late[key]
            for room in self._reads.rooms.values():
                if room.peer == peer:
                    room.peer = None
                    room.hello = None
            self._reads.lock.notify_all()

    def tick(self, now: float) -> None:
        """Take back claims whose lease ended, plan reads whose HELLO did not come, and say that we are alive."""
        del now  # the reads' own clock counts
        with self._reads.lock:
            clock = self._reads.clock()
            for read in list(self._reads.reads.values()):
                self._expire(read, clock)
                if not read.planned:
                    # Own readers wait for its reservation to end, which wakes nobody.
                    self._reads.lock.notify_all()
                if not read.planned and clock >= read.opened_s + self._reads.hello_wait_s:
                    self._reads.silent_requests += 1
                    self._reads.fallback("no_hello", read)
                    self._apply(read, prefill_alone(self._request(read), "no decode engine asked"))
            quiet_s = self._reads.config.hello_silence_s / 3
            for number, room in list(self._reads.rooms.items()):
                if room.peer is None or room.hello is None or clock < room.spoke_s + quiet_s:
                    continue
                if room.closed is None:
                    if not room.arrived and clock >= room.hello_s + _UNKNOWN_ROOM_S:
                        room.closed = NoOfferReason.UNKNOWN
                        self._answer(number, room)
                    else:
                        room.spoke_s = clock
                        self._send(room.peer, Queued(number, "reading" if room.read else "waiting"))
            for number, attempt, claim_id in self._reads.late:
                peer, _ = self._reads.late[(number, attempt, claim_id)]
                if peer is not None and self._due(number, clock, quiet_s):
                    self._send(peer, Cancel(number, attempt, claim_id))

    def _due(self, number: int, clock: float, every_s: float) -> bool:
        room = self._reads.rooms.get(number)
        if room is None or clock >= room.spoke_s + every_s:
            if room is not None:
                room.spoke_s = clock
            return True
        return False

    # -- HELLO and offers --------------------------------------------------------------------------------------------

    def _hello(self, peer: bytes, hello: Hello) -> None:
        problem = self._incompatible(hello)
        if problem is not None:
            metrics.FALLBACKS.add(reason=problem)
            logger.warning("No offer to %s: %s.", hello.engine, problem)
            self._send(peer, NoOffer(hello.room, NoOfferReason.VERSION))
            return
        now = self._reads.clock()
        self._reads.silent_requests = 0
        room = self._reads.room(hello.room)
        room.hello, room.peer, room.hello_s, room.spoke_s = hello, peer, now, now
        self._views[hello.engine] = EngineView(
            engine=hello.engine,
            role=Role.DECODE,
            queued_read_bytes=hello.queued_read_bytes,
            read_bytes_per_s=hello.read_bytes_per_s,
        )
        read = room.read
        if read is not None and not read.closed:
            self._plan(read)
        elif room.closed is not None:
            self._answer(hello.room, room)
        else:
            self._send(peer, Queued(hello.room, "known" if room.arrived else "unknown"))
        self._reads.lock.notify_all()

    def _incompatible(self, hello: Hello) -> str | None:
        pool = self._reads.pages
        if hello.version != PROTOCOL_VERSION or hello.package != __version__:
            return "package_version"
        if hello.page_tokens != pool.page_tokens or hello.plane_bytes != self._plane_bytes:
            return "page_layout"
        if hello.tp_size != 1:
            return "tp_size"
        return None

    def _answer(self, number: int, room: Room) -> None:
        if room.peer is not None and room.hello is not None and room.closed is not None:
            metrics.OFFERS.add(outcome=f"none_{room.closed.value}")
            self._send(room.peer, NoOffer(number, room.closed))
            room.hello = None

    def _request(self, read: PrefillRead) -> ReadRequest:
        room = self._reads.rooms.get(read.room) if read.room is not None else None
        hello = room.hello if room is not None else None
        held = 0
        if hello is not None:
            held = max(0, min(hello.held_end_page, read.prefetch.end_page) - read.prefetch.first_page)
        return ReadRequest(
            room=read.room or 0,
            prefill=self._engine,
            decode=hello.engine if hello is not None else None,
            hit_pages=read.prefetch.stored_pages,
            page_bytes=self._reads.pages.page_bytes,
            decode_held_pages=held,
            deadline_s=max(0.0, read.deadline_s - self._reads.clock()),
            chunk_bytes=self._reads.config.chunk_bytes,
        )

    def _plan(self, read: PrefillRead) -> None:
        """Decide who reads, or wait for the HELLO if the policy wants to know the decode engine."""
        room = self._reads.rooms.get(read.room) if read.room is not None else None
        hello = room.hello if room is not None else None
        if read.planned:
            if hello is not None and room is not None and read.decode is None:
                self._answer_late(read, room)
            return
        request = self._request(read)
        if hello is None and read.attempt > 0:
            # The decode engine had its part in an earlier attempt and has gone on without this one.
            self._apply(read, prefill_alone(request, "later attempt"))
            return
        if hello is None and self._policy.needs_decode:
            ahead = getattr(self._policy, "reads_ahead", False)
            self._hold(read, self._reads.grace_s if ahead else self._reads.hello_wait_s)
            return
        try:
            plan = validate_plan(self._policy.plan(request, self._view(request)), request)
        except Exception:
            logger.exception("Policy %s failed; the prefill server reads alone.", type(self._policy).__name__)
            metrics.FALLBACKS.add(reason="policy_error")
            plan = prefill_alone(request, "policy failed")
        self._apply(read, plan)

    def _view(self, request: ReadRequest) -> ClusterView:
        own = EngineView(
            engine=self._engine,
            role=Role.PREFILL,
            # The queue in front of this read: its own bytes are in the ledgers already.
            queued_read_bytes=max(0, self._reads.queued_read_bytes() - request.read_bytes),
            read_bytes_per_s=self._reads.rate.bytes_per_s,
            requests_in_flight=len(self._reads.reads),
        )
        decode = self._views.get(request.decode) if request.decode is not None else None
        return ClusterView([own] if decode is None else [own, decode])

    def _hold(self, read: PrefillRead, wait_s: float) -> None:
        """Keep the own reader off this read for a while, by a reservation for a reader that has yet to come."""
        span = read.prefetch
        read.ledger.join(_AWAITED, Share(End.FRONT, exposed=True, lease_s=wait_s))
        read.ledger.reserve_range(_AWAITED, span.first_page, span.end_page, until_s=self._reads.clock() + wait_s)

    def _apply(self, read: PrefillRead, plan: ReadPlan) -> None:
        now = self._reads.clock()
        read.planned = True
        read.ledger.leave(_AWAITED, now_s=now)
        room = self._reads.rooms.get(read.room) if read.room is not None else None
        if room is not None and room.hello is not None:
            share = plan.share_of(room.hello.engine)
            if share is None:
                self._refuse_offer(read, room, NoOfferReason.POLICY)
            else:
                own = plan.share_of(self._engine)
                # Without a share of its own the prefill engine's reader stays the fallback, which a limit of 0 makes it.
                limit = 0 if own is None else own.limit_pages
                read.ledger.join(OWN, Share(End.BACK, limit_pages=limit), local=True)
                self._offer(read, room, share.limit_pages)
        self._reads.lock.notify_all()

    def _answer_late(self, read: PrefillRead, room: Room) -> None:
        """A HELLO that came after the plan. The plan stands: with a policy that does not wait, prefill reads alone."""
        self._refuse_offer(read, room, NoOfferReason.POLICY)

    def _refuse_offer(self, read: PrefillRead, room: Room, reason: NoOfferReason) -> None:
        if room.peer is not None and read.room is not None:
            metrics.OFFERS.add(outcome=f"none_{reason.value}")
            self._send(room.peer, NoOffer(read.room, reason))
        room.hello = None

    def _offer(self, read: PrefillRead, room: Room, limit_pages: int | None) -> None:
        hello, peer, number = room.hello, room.peer, read.room
        if hello is None or peer is None or number is None:
            return
        now = self._reads.clock()
        config = self._reads.config
        span = read.prefetch
        # Pages that the decode engine has in device memory alone can neither be pushed nor be kept from a read, and a
        # prefix that ends before this read begins cannot be continued by it.
        held_all = hello.held_end_page >= min(hello.match_pages, span.end_page)
        if hello.match_pages < span.first_page or (hello.match_pages > span.first_page and not held_all):
            metrics.FALLBACKS.add(reason="decode_prefix_gap")
            self._refuse_offer(read, room, NoOfferReason.UNSUPPORTED)
            return
        if self._reads.reserve.free == 0:
            metrics.FALLBACKS.add(reason="reserve_empty")
            self._refuse_offer(read, room, NoOfferReason.RESERVE)
            return
        read.decode, read.peer = hello.engine, peer
        read.ledger.join(hello.engine, Share(End.FRONT, limit_pages=limit_pages, lease_s=config.lease_s, exposed=True))
        held_end = min(hello.held_end_page, span.end_page)
        if held_end > span.first_page:
            read.ledger.reserve_range(hello.engine, span.first_page, held_end, until_s=now + 2 * config.lease_s)
        room.spoke_s = now
        metrics.OFFERS.add(outcome="made")
        self._send(
            peer,
            Offer(
                room=number,
                attempt=read.attempt,
                first_page=span.first_page,
                end_page=span.end_page,
                storage_end_page=span.first_page + span.stored_pages,
                end_hash=span.hashes[-1],
                target=self._target,
                lease_s=config.lease_s,
                chunk_pages=self._reads.chunk_pages,
                limit_pages=limit_pages,
                engine=self._engine,
            ),
        )

    # -- claims and last words ---------------------------------------------------------------------------------------

    def _open_read(self, peer: bytes, room: int, attempt: int) -> PrefillRead | None:
        state = self._reads.rooms.get(room)
        read = state.read if state is not None else None
        if read is None or read.attempt != attempt or read.peer != peer or read.closed:
            return None
        return read

    def _expire(self, read: PrefillRead, now: float) -> None:
        expired = read.ledger.expire(now_s=now)
        if expired:
            self._reads.fallback("lease_expired", read)
            self._reads.take_back(read, expired)

    def _claim(self, peer: bytes, message: Claim) -> None:
        read = self._open_read(peer, message.room, message.attempt)
        now = self._reads.clock()
        if read is None or read.decode is None:
            self._refuse(peer, message, RefusalReason.CLOSED, retry=False)
            return
        self._expire(read, now)
        answer = read.ledger.claim(read.decode, max_pages=message.max_pages, now_s=now)
        self._reads.rooms[message.room].spoke_s = now
        if not isinstance(answer, Grant):
            self._refuse(peer, message, answer.reason, retry=answer.retry)
            return
        read.claims[answer.claim_id] = answer
        metrics.CLAIMS.add(outcome="granted")
        self._send(
            peer,
            GrantMessage(
                room=message.room,
                attempt=message.attempt,
                request_id=message.request_id,
                claim_id=answer.claim_id,
                first_page=answer.first_page,
                slots=answer.slots,
                memory=answer.source is Source.MEMORY,
                lease_s=self._reads.config.lease_s,
            ),
        )

    def _refuse(self, peer: bytes, claim: Claim, reason: RefusalReason, *, retry: bool) -> None:
        metrics.CLAIMS.add(outcome=f"refused_{reason.value}")
        self._send(
            peer,
            Refuse(claim.room, claim.attempt, claim.request_id, reason.value, retry, _RETRY_AFTER_S if retry else 0.0),
        )

    def _done(self, peer: bytes, message: Done) -> None:
        self._note_load(peer, message)
        if self._late_word(peer, message.room, message.attempt, message.claim_id):
            return
        read = self._open_read(peer, message.room, message.attempt)
        if read is None:
            return
        now = self._reads.clock()
        # A page that arrives after its lease must not count, even if no tick came in between: its slot is given up.
        self._expire(read, now)
        grant = read.claims.pop(message.claim_id, None)
        if grant is None:
            self._late_word(peer, message.room, message.attempt, message.claim_id)
            return
        good = min(message.good_pages, grant.pages)
        read.ledger.land(message.claim_id, good_pages=good, now_s=now)
        metrics.RECEIVED_BYTES.add(good * self._reads.pages.page_bytes)
        if good < grant.pages:
            self._reads.fallback("decode_read_error", read)
        self._reads.lock.notify_all()

    def _note_load(self, peer: bytes, message: Done) -> None:
        room = self._reads.rooms.get(message.room)
        read = room.read if room is not None else None
        if read is not None and read.decode is not None and read.peer == peer:
            view = self._views.get(read.decode)
            hop = view.hop_bytes_per_s if view is not None else None
            self._views[read.decode] = EngineView(
                engine=read.decode,
                role=Role.DECODE,
                queued_read_bytes=message.queued_read_bytes,
                read_bytes_per_s=message.read_bytes_per_s,
                hop_bytes_per_s=hop,
            )

    def _failed(self, peer: bytes, message: Fail | Cancelled) -> None:
        if self._late_word(peer, message.room, message.attempt, message.claim_id):
            return
        read = self._open_read(peer, message.room, message.attempt)
        if read is None or read.claims.pop(message.claim_id, None) is None:
            return
        read.ledger.fail(message.claim_id, now_s=self._reads.clock())
        if isinstance(message, Fail):
            self._reads.fallback("decode_claim_failed", read)
            logger.warning("Decode engine %s failed a claim: %s", read.decode, message.reason)
        self._reads.lock.notify_all()

    def _late_word(self, peer: bytes, room: int, attempt: int, claim_id: int) -> bool:
        entry = self._reads.late.get((room, attempt, claim_id))
        if entry is None or entry[0] != peer:
            return False
        entry[1].settle_late(claim_id)
        del self._reads.late[(room, attempt, claim_id)]
        return True

    def _left(self, peer: bytes, message: Decline | Settled | Bye) -> None:
        room = self._reads.rooms.get(message.room)
        if room is not None and room.peer == peer:
            room.hello = None
        read = self._open_read(peer, message.room, message.attempt)
        if read is None or read.decode is None:
            return
        if isinstance(message, Decline):
            metrics.OFFERS.add(outcome=f"declined_{message.reason}")
        read.ledger.leave(read.decode, now_s=self._reads.clock())
        self._reads.lock.notify_all()

    def _say_cancel(self, read: PrefillRead, expired: Iterable[Expired]) -> None:
        if read.peer is None or read.room is None:
            return
        for one in expired:
            self._send(read.peer, Cancel(read.room, read.attempt, one.grant.claim_id))
