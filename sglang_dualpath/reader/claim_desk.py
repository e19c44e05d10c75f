"""Claims of decode engines and their last words, at the prefill engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from sglang_dualpath import metrics
from sglang_dualpath.ledger import Expired, Grant, RefusalReason, Source
from sglang_dualpath.protocol import Cancel, Cancelled, Claim, Done, Fail, Message, Refuse
from sglang_dualpath.protocol import Grant as GrantMessage
from sglang_dualpath.reader.planning import Planner
from sglang_dualpath.reader.prefill import PrefillRead, PrefillReads

logger = logging.getLogger(__name__)

# Refused claims ask again after this: half of what a 4 MiB chunk takes on a 2 GB/s link, and a few control round trips.
_RETRY_AFTER_S = 0.01
# A last word that is owed comes when a storage read or a push has ended.
_LATE_RETRY_AFTER_S = 0.05


class ClaimDesk:
    """Grants claims, lands what was pushed, takes back what was not. Called with the lock of ``reads`` held."""

    def __init__(self, reads: PrefillReads, planner: Planner, send: Callable[[bytes, Message], object]) -> None:
        self._reads = reads
        self._planner = planner
        self._send = send
        reads.cancel = self._say_cancel

    def open_read(self, peer: bytes, room: int, attempt: int) -> PrefillRead | None:
        """The read that ``peer`` means, if it was offered to it and is open."""
        read = self._reads.by_number.get((room, attempt))
        if read is None or read.peer != peer or read.closed:
            return None
        return read

    def claim(self, peer: bytes, message: Claim) -> None:
        read = self.open_read(peer, message.room, message.attempt)
        if read is None or read.decode is None or read.prefetch.is_cancelled():
            self._refuse(peer, message, RefusalReason.CLOSED, retry=False)
            return
        now = self._reads.clock()
        self.expire(read, now)
        answer = read.ledger.claim(read.decode, max_pages=message.max_pages, now_s=now)
        room = self._reads.rooms.get(message.room)
        if room is not None and room.peer == peer:
            room.spoke_s = now
        if not isinstance(answer, Grant):
            self._refuse(peer, message, answer.reason, retry=answer.retry)
            return
        # A refused claim is no progress: asking again and again for want of spares must not hold up the reads behind.
        read.progress_s = now
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
        after_s = _LATE_RETRY_AFTER_S if reason is RefusalReason.LATE else _RETRY_AFTER_S
        self._send(
            peer,
            Refuse(claim.room, claim.attempt, claim.request_id, reason.value, retry, after_s if retry else 0.0),
        )

    def done(self, peer: bytes, message: Done) -> None:
        read = self.open_read(peer, message.room, message.attempt)
        if read is not None:
            self._planner.note(peer, message)
            # A page that arrives after its lease must not count, even if no tick came in between: its slot is given up.
            self.expire(read, self._reads.clock())
        if self._late_word(peer, message) or read is None:
            return
        grant = read.claims.pop(message.claim_id, None)
        if grant is None:
            return
        now = self._reads.clock()
        good = min(message.good_pages, grant.pages)
        read.ledger.land(message.claim_id, good_pages=good, now_s=now)
        read.progress_s = now
        metrics.CLAIMS.add(outcome="landed" if good == grant.pages else "short")
        metrics.RECEIVED_BYTES.add(good * self._reads.pages.page_bytes)
        if good < grant.pages:
            self._reads.fallback("decode_read_error", read)
        self._reads.lock.notify_all()

    def failed(self, peer: bytes, message: Fail | Cancelled) -> None:
        read = self.open_read(peer, message.room, message.attempt)
        if read is not None:
            # After a freeze this word may come before the tick, and before the last bytes of the push: not into slots
            # that are granted again.
            self.expire(read, self._reads.clock())
        if self._late_word(peer, message) or read is None:
            return
        if read.claims.pop(message.claim_id, None) is None:
            return
        now = self._reads.clock()
        read.ledger.fail(message.claim_id, now_s=now)
        read.progress_s = now
        metrics.CLAIMS.add(outcome="failed" if isinstance(message, Fail) else "cancelled")
        if isinstance(message, Fail):
            self._reads.fallback("decode_claim_failed", read)
            logger.warning("Decode engine %s failed a claim: %s", read.decode, message.reason)
        self._reads.lock.notify_all()

    def _late_word(self, peer: bytes, message: Done | Fail | Cancelled) -> bool:
        """Whether this is the last word on a claim that was taken back. Its slots become spares."""
        key = (message.room, message.attempt, message.claim_id)
        late = self._reads.late.get(key)
        if late is None or late.peer != peer:
            return False
        if isinstance(message, Fail) or late.release_s is not None:
            # The push failed. If this engine was frozen meanwhile, its kernel may hold bytes of it that its transfer
            # engine has yet to copy, just as it held this message.
            late.release_s = late.release_s or self._reads.clock() + self._reads.config.lease_s
        else:
            self._release(key)
        return True

    def _release(self, key: tuple[int, int, int]) -> None:
        self._reads.late.pop(key).ledger.settle_late(key[2])

    def expire(self, read: PrefillRead, now: float) -> None:
        """Take back what is past its lease."""
        expired = read.ledger.expire(now_s=now)
        if expired:
            metrics.CLAIMS.add(len(expired), outcome="expired")
            self._reads.fallback("lease_expired", read)
            self._reads.take_back(read, expired)

    def gone(self, peer: bytes) -> None:
        """The writer is dead: what it had is taken back, and nothing of it is awaited."""
        now = self._reads.clock()
        for read in list(self._reads.reads.values()):
            if read.peer == peer:
                self._reads.take_back(read, read.ledger.revoke(peer.decode("ascii"), now_s=now))
                read.decode = read.peer = None
                self._reads.fallback("decode_gone", read)
        for key in [key for key, late in self._reads.late.items() if late.peer == peer]:
            self._release(key)

    def tick(self, now: float) -> None:
        for read in list(self._reads.reads.values()):
            self.expire(read, now)
        for key, late in list(self._reads.late.items()):
            if late.release_s is not None and now >= late.release_s:
                self._release(key)
            elif late.peer is not None and late.release_s is None and now >= late.cancel_again_s:
                late.cancel_again_s = now + self._reads.cancel_every_s
                self._send(late.peer, Cancel(*key))

    def _say_cancel(self, read: PrefillRead, expired: Iterable[Expired]) -> None:
        if read.peer is None or read.room is None:
            return
        for one in expired:
            self._send(read.peer, Cancel(read.room, read.attempt, one.grant.claim_id))
