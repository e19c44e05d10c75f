"""What decode engines ask of a prefill engine, answered on its control thread."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from sglang_dualpath import __version__, metrics
from sglang_dualpath.ledger import Share
from sglang_dualpath.ledger.types import End
from sglang_dualpath.policy import BalancingPolicy, ReadPlan
from sglang_dualpath.protocol import (
    PROTOCOL_VERSION,
    Bye,
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
    Settled,
    Target,
)
from sglang_dualpath.reader.claim_desk import ClaimDesk
from sglang_dualpath.reader.planning import Planner
from sglang_dualpath.reader.prefill import OWN, PrefillRead, PrefillReads, Room

logger = logging.getLogger(__name__)

# A decode server often gets a request before the prefill server does; a router that never sends it there is at fault.
_UNKNOWN_ROOM_S = 10.0
# A reader that has yet to say HELLO. A blank: no engine can have this name.
_AWAITED = "awaited reader"
# The tick ends a wait for HELLO; the reservation outlasts it so that none is ended, uncounted, by running out.
_TICK_MARGIN_S = 0.5
_GAUGES_S = 1.0
# Peers that vanished without this engine sending to them are forgotten after this.
_FORGET_PEER_S = 3600.0


class OfferDesk:
    """Offers shares of reads, and passes claims on to its :class:`~sglang_dualpath.reader.claim_desk.ClaimDesk`.

    Args:
        reads: the prefill engine's reads.
        policy: decides who may claim.
        engine: this engine's id, as policies see it.
        session: its transfer session, where decode engines push to.
        metadata: what they must know of it besides; it goes to each of them once.
        send: ``send(peer, message)``; thread-safe and never blocks.
    """

    def __init__(
        self,
        reads: PrefillReads,
        *,
        policy: BalancingPolicy,
        engine: str,
        session: str,
        metadata: bytes = b"",
        send: Callable[[bytes, Message], object],
    ) -> None:
        self._reads = reads
        self._send = send
        self._planner = Planner(reads, policy=policy, engine=engine)
        self._claims = ClaimDesk(reads, self._planner, send)
        pool = reads.pages
        self._target = Target(
            session=session,
            planes=tuple(Plane(*plane) for plane in pool.planes),
            slots=pool.slots,
            metadata=metadata,
        )
        self._target_by_name = msgspec.structs.replace(self._target, metadata=b"")
        self._plane_bytes = tuple(plane.page_bytes for plane in pool.planes)
        self._gauges_s = 0.0
        reads.asks_decode = self._planner.needs_decode
        reads.planner = self._plan
        reads.answer = self._answer

    # -- messages, on the control thread ---------------------------------------------------------------------------

    def handle(self, peer: bytes, message: Message) -> None:
        """One message of a decode engine."""
        with self._reads.lock:
            self._reads.heard_s[peer] = self._reads.clock()
            match message:
                case Hello():
                    self._hello(peer, message)
                case Claim():
                    self._claims.claim(peer, message)
                case Done():
                    self._claims.done(peer, message)
                case Fail() | Cancelled():
                    self._claims.failed(peer, message)
                case Decline() | Settled() | Bye():
                    self._left(peer, message)
                case _:
                    metrics.CONTROL_ERRORS.add(kind="unexpected_message")

    def gone(self, peer: bytes) -> None:
        """The peer's connection was closed by its kernel: its process is gone and writes no more."""
        with self._reads.lock:
            self._claims.gone(peer)
            self._planner.forget(peer)
            self._reads.heard_s.pop(peer, None)
            for room in self._reads.rooms.values():
                if room.peer == peer:
                    room.peer = room.hello = None
            self._reads.lock.notify_all()

    def tick(self, now: float) -> None:
        """Take back claims whose lease ended, plan reads whose HELLO did not come, and say that we are alive."""
        del now  # the reads' own clock counts
        with self._reads.lock:
            clock = self._reads.clock()
            self._claims.tick(clock)
            for read in list(self._reads.reads.values()):
                if read.planned:
                    continue
                # Own readers wait for its reservation to end, which wakes nobody.
                self._reads.lock.notify_all()
                if clock >= read.opened_s + self._reads.hello_wait_s:
                    self._reads.silent_requests += 1
                    self._reads.fallback("no_hello", read)
                    self._apply(read, self._planner.alone(read, "no decode engine asked"))
            self._reassure(clock)
            if clock >= self._gauges_s + _GAUGES_S:
                self._gauges_s = clock
                self._measure(clock)

    def _reassure(self, clock: float) -> None:
        """Decode engines take silence for death, so those that wait hear something now and then."""
        quiet_s = self._reads.config.hello_silence_s / 3
        for number, room in list(self._reads.rooms.items()):
            if room.peer is None or room.hello is None or clock < room.spoke_s + quiet_s or room.closed is not None:
                continue
            if not room.arrived and clock >= room.hello_s + _UNKNOWN_ROOM_S:
                room.closed = NoOfferReason.UNKNOWN
                self._answer(number, room)
            else:
                room.spoke_s = clock
                self._send(room.peer, Queued(number, "reading" if room.read else "waiting"))

    def _measure(self, clock: float) -> None:
        reserve = self._reads.reserve
        metrics.READ_QUEUE_BYTES.set(self._reads.queued_read_bytes())
        metrics.RESERVE_SLOTS.set(reserve.free, state="free")
        metrics.RESERVE_SLOTS.set(reserve.backing, state="backing")
        metrics.RESERVE_SLOTS.set(reserve.quarantined, state="quarantined")
        for peer in [peer for peer, heard_s in self._reads.heard_s.items() if clock > heard_s + _FORGET_PEER_S]:
            del self._reads.heard_s[peer]
            self._planner.forget(peer)

    # -- HELLO and who leaves ----------------------------------------------------------------------------------------

    def _hello(self, peer: bytes, hello: Hello) -> None:
        now = self._reads.clock()
        room = self._reads.room(hello.room)
        problem = self._incompatible(peer, hello)
        if problem is not None:
            metrics.FALLBACKS.add(reason=problem)
            logger.warning("No offer to %s: %s.", hello.engine, problem)
            self._send(peer, NoOffer(hello.room, NoOfferReason.VERSION))
            self._go_alone(room, "the decode engine is incompatible")
            return
        self._reads.silent_requests = 0
        if room.hello is not None and room.peer is not None and room.peer != peer:
            # One request has one decode engine. The first may be dead and this one its second try.
            self._send(room.peer, NoOffer(hello.room, NoOfferReason.CLOSED))
        room.hello, room.peer, room.hello_s, room.spoke_s = hello, peer, now, now
        self._planner.note(peer, hello)
        read = room.read
        if read is not None and not read.closed:
            if not read.planned:
                self._plan(read)
            elif read.peer is None and not room.alone and self._planner.reads_ahead:
                # Late, and still of use: what is left can be shared.
                self._apply(read, self._planner.plan(read, hello))
            elif read.peer != peer:
                # The plan stands: with a policy that does not wait, or after it waited, prefill reads alone.
                self._refuse_offer(read, room, NoOfferReason.POLICY)
        elif room.closed is not None:
            self._answer(hello.room, room)
        else:
            self._send(peer, Queued(hello.room, "known" if room.arrived else "unknown"))
        self._reads.lock.notify_all()

    def _incompatible(self, peer: bytes, hello: Hello) -> str | None:
        pool = self._reads.pages
        if hello.version != PROTOCOL_VERSION or hello.package != __version__:
            return "package_version"
        if hello.page_tokens != pool.page_tokens or hello.plane_bytes != self._plane_bytes:
            return "page_layout"
        if hello.tp_size != 1:
            return "tp_size"
        if hello.engine.encode() != peer:
            # Readers are told apart by their engine id, which is what the connection was authenticated under.
            return "engine_name"
        return None

    def _left(self, peer: bytes, message: Decline | Settled | Bye) -> None:
        room = self._reads.rooms.get(message.room)
        mine = room is not None and room.peer == peer
        read = self._claims.open_read(peer, message.room, message.attempt)
        if isinstance(message, Decline):
            metrics.OFFERS.add(outcome="declined")
            logger.info("Room %s: %s declines: %s", message.room, peer.decode("ascii", "replace"), message.reason)
        if read is not None and read.decode is not None:
            read.ledger.leave(read.decode, now_s=self._reads.clock())
            read.decode = None
        if room is not None and mine:
            room.hello = None
            self._go_alone(room, "the decode engine left")
        self._reads.lock.notify_all()

    def _go_alone(self, room: Room, reason: str) -> None:
        """No HELLO is to be awaited for this room."""
        room.alone = True
        if room.read is not None and not room.read.planned and not room.read.closed:
            self._apply(room.read, self._planner.alone(room.read, reason))
        self._reads.lock.notify_all()

    # -- plans and offers --------------------------------------------------------------------------------------------

    def _answer(self, number: int, room: Room) -> None:
        if room.peer is not None and room.hello is not None and room.closed is not None:
            metrics.OFFERS.add(outcome=f"none_{room.closed.value}")
            self._send(room.peer, NoOffer(number, room.closed))
            room.hello = None

    def _plan(self, read: PrefillRead) -> None:
        """Decide who reads, or wait for the HELLO if the policy wants to know the decode engine."""
        room = self._reads.rooms.get(read.room) if read.room is not None else None
        hello = room.hello if room is not None else None
        if hello is None and (read.attempt > 0 or (room is not None and room.alone)):
            # The decode engine had its part in an earlier attempt, or wants none, and has gone on without this one.
            self._apply(read, self._planner.alone(read, "no decode engine"))
        elif hello is None and self._planner.needs_decode:
            ahead = self._planner.reads_ahead
            self._hold(read, self._reads.grace_s if ahead else self._reads.hello_wait_s + _TICK_MARGIN_S)
        else:
            self._apply(read, self._planner.plan(read, hello))

    def _hold(self, read: PrefillRead, wait_s: float) -> None:
        """Keep the own reader off this read for a while, by a reservation for a reader that has yet to come."""
        span = read.prefetch
        read.ledger.join(_AWAITED, Share(End.FRONT, exposed=True, lease_s=wait_s))
        read.ledger.reserve_range(_AWAITED, span.first_page, span.end_page, until_s=self._reads.clock() + wait_s)

    def _apply(self, read: PrefillRead, plan: ReadPlan) -> None:
        read.planned = True
        room = self._reads.rooms.get(read.room) if read.room is not None else None
        if room is not None and room.hello is not None:
            share = plan.share_of(room.hello.engine)
            if share is None:
                self._refuse_offer(read, room, NoOfferReason.POLICY)
            elif self._offer(read, room, share.limit_pages):
                own = plan.share_of(self._planner.engine)
                # Without a share of its own, this engine's reader stays the fallback: a limit of 0 makes it that.
                limit = 0 if own is None else own.limit_pages
                read.own_share = own is not None
                read.ledger.join(OWN, Share(End.BACK, limit_pages=limit), local=True)
        read.ledger.leave(_AWAITED, now_s=self._reads.clock())
        self._reads.lock.notify_all()

    def _refuse_offer(self, read: PrefillRead, room: Room, reason: NoOfferReason) -> None:
        if room.peer is not None and read.room is not None:
            metrics.OFFERS.add(outcome=f"none_{reason.value}")
            self._send(room.peer, NoOffer(read.room, reason))
        room.hello = None

    def _offer(self, read: PrefillRead, room: Room, limit_pages: int | None) -> bool:
        hello, peer, number = room.hello, room.peer, read.room
        if hello is None or peer is None or number is None:
            return False
        now = self._reads.clock()
        config = self._reads.config
        span = read.prefetch
        # Pages that the decode engine has in device memory alone can neither be pushed nor be kept from a read, and a
        # prefix that ends before this read begins cannot be continued by it.
        held_all = hello.held_end_page >= min(hello.match_pages, span.end_page)
        if hello.match_pages < span.first_page or (hello.match_pages > span.first_page and not held_all):
            metrics.FALLBACKS.add(reason="decode_prefix_gap")
            self._refuse_offer(read, room, NoOfferReason.UNSUPPORTED)
            return False
        if self._reads.reserve.free == 0:
            self._reads.fallback("reserve_empty", read)
            self._refuse_offer(read, room, NoOfferReason.RESERVE)
            return False
        share = Share(End.FRONT, limit_pages=limit_pages, lease_s=config.lease_s, exposed=True)
        if not read.ledger.join(hello.engine, share):
            self._refuse_offer(read, room, NoOfferReason.CLOSED)
            return False
        read.decode, read.peer, read.progress_s = hello.engine, peer, now
        held_end = min(hello.held_end_page, span.end_page)
        if held_end > span.first_page:
            read.ledger.reserve_range(hello.engine, span.first_page, held_end, until_s=now + config.lease_s)
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
                target=self._target_by_name if hello.session == self._target.session else self._target,
                lease_s=config.lease_s,
                chunk_pages=self._reads.chunk_pages,
                limit_pages=limit_pages,
                engine=self._planner.engine,
            ),
        )
        return True
