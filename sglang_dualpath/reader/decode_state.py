"""The state of a decode engine's reads, and what may be done to it: everything here is called with the lock held."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from sglang_dualpath import metrics
from sglang_dualpath.config import DualPathConfig
from sglang_dualpath.protocol import Cancelled, Claim, Done, Fail, Message, Settled
from sglang_dualpath.reader.decode_read import Asked, Chunk, DecodeRead, Phase
from sglang_dualpath.reader.pool import HostPages
from sglang_dualpath.reader.prefetch import Rate
from sglang_dualpath.reader.pump import ClaimPump
from sglang_dualpath.reader.sessions import Sessions

logger = logging.getLogger(__name__)


class Withheld(NamedTuple):
    """The last word on a claim whose push failed, until no byte of it can arrive any more."""

    due_s: float
    over: Callable[[], bool]
    """Whether the transfer engine has ended the push; not before that, however late it is."""
    endpoint: str | None
    word: Fail


@dataclass(kw_only=True, eq=False)
class DecodeState:
    """Reads by room, the claims in hand, and the one lock that guards them."""

    config: DualPathConfig
    pages: HostPages
    engine: str
    rank: int
    tp_size: int = 1
    send: Callable[[str, Message], object]
    """``send(endpoint, message)``; thread-safe and never blocks."""
    clock: Callable[[], float] = time.monotonic
    on_silence: Callable[[str], None] = lambda endpoint: None
    """Called, with the lock held, with the endpoint of a prefill engine that answers no more."""
    rate: Rate = field(default_factory=Rate)
    hop_rate: Rate = field(default_factory=Rate)
    lock: threading.Condition = field(default_factory=threading.Condition)
    reads: OrderedDict[int, DecodeRead] = field(default_factory=OrderedDict)
    """By room; those that were opened in the order in which SGLang waits for them, which is that of their opening.

    Prefill engines offer in the order in which they wait themselves, so both engines read the same one first. A read
    that had to wait for room in the host pool is thus younger than one that was accepted later and did not.
    """
    in_hand: set[tuple[str | None, int]] = field(default_factory=set)
    """Claims, by endpoint and claim id, whose last word this engine owes."""
    draining: list[Withheld] = field(default_factory=list)
    sessions: Sessions = field(default_factory=Sessions)
    offers: Iterator[int] = field(default_factory=itertools.count)
    stopped: bool = False
    _requests: int = 0

    def __post_init__(self) -> None:
        self.claims = ClaimPump(self.config)

    def say(self, read: DecodeRead, message: Message) -> None:
        if read.endpoint is not None:
            self.send(read.endpoint, message)

    def last_word(self, read: DecodeRead, word: Done | Fail | Cancelled) -> None:
        """This engine writes no more for the claim."""
        self.in_hand.discard((read.endpoint, word.claim_id))
        self.say(read, word)

    def drop(self, chunk: Chunk) -> None:
        """A granted chunk that nobody has begun to carry."""
        chunk.read.granted.remove(chunk)
        self.last_word(chunk.read, Cancelled(chunk.read.room, chunk.grant.attempt, chunk.grant.claim_id))

    def fall_back(self, read: DecodeRead, reason: str) -> None:
        """Claim no more for this read because of a fault, which is counted and logged."""
        self.note_fallback(read, reason)
        self.end(read, reason)

    def lost_lease(self, read: DecodeRead, reason: str) -> None:
        """A chunk was late by this engine's clock. Others read it; too many of them, and they read all."""
        read.leases_lost += 1
        # Two freezes with all claims in flight. The prefill engine has a limit of its own, by its own clock.
        if read.leases_lost > 2 * self.claims.claims_per_engine:
            self.fall_back(read, reason)
        else:
            self.note_fallback(read, reason)

    def note_fallback(self, read: DecodeRead, reason: str) -> None:
        """Count and log a fault that others make good."""
        metrics.FALLBACKS.add(reason=reason)
        logger.warning("DualPath falls back (%s) for room %s, prefill at %s.", reason, read.room, read.endpoint)

    def end(self, read: DecodeRead, why: str) -> None:
        """Claim no more for this read, and carry only what is in work already."""
        for chunk in list(read.granted):
            self.drop(chunk)
        self.claim_no_more(read, why)

    def claim_no_more(self, read: DecodeRead, why: str) -> None:
        """Carry what was granted, and tell the prefill engine that it was the last."""
        if read.ended is None:
            read.ended = why
            read.requested.clear()
            if read.offer is not None:
                self.say(read, Settled(read.room, read.attempt, read.kept_pages()))
            self.lock.notify_all()

    def settle(self, read: DecodeRead) -> None:
        """The request may go on."""
        if read.phase is not Phase.SETTLED:
            read.phase = Phase.SETTLED
            self.pump()
            self.lock.notify_all()

    def pump(self) -> None:
        """Send the claims that are due, and end reads that have nothing left to claim."""
        if self.stopped:
            return
        for read in self.reads.values():
            if read.ended is None and read.through:
                self.claim_no_more(read, "through")
        self._avoid_hanging_pushes()
        now = self.clock()
        for read in self.claims.next_claims(self.reads, now):
            self._requests += 1
            assert read.offer is not None
            read.requested[self._requests] = Asked(now, read.memory_left > 0)
            pages = self.claims.claim_pages(read.offer, self.rate, self.pages.page_bytes)
            self.say(read, Claim(read.room, read.attempt, self._requests, pages))

    def _avoid_hanging_pushes(self) -> None:
        """What is read for an engine could not be pushed to it while a failed push to it has not ended."""
        hanging = {one.endpoint for one in self.draining if not one.over()}
        if not hanging:
            return
        for read in self.reads.values():
            idle = not (read.requested or read.granted or read.busy)
            if read.ended is None and read.offer is not None and idle and read.endpoint in hanging:
                self.fall_back(read, "push_hangs")
                if read.phase is Phase.OFFERED:
                    self.settle(read)

    def queued_bytes(self) -> int:
        """Bytes of opened reads that this engine has not read, claimed or not."""
        pages = 0
        for read in self.reads.values():
            if read.ended is None and read.offer is not None and read.prefetch is not None:
                pages += max(0, read.prefetch.pages - len(read.landed))
        return pages * self.pages.page_bytes

    def drop_overdue(self) -> None:
        """Granted chunks whose lease ended before anybody read them."""
        now = self.clock()
        for read in self.reads.values():
            overdue = [chunk for chunk in read.granted if now >= chunk.deadline_s]
            for chunk in overdue:
                self.drop(chunk)
            for _ in overdue:
                self.lost_lease(read, "lease_over_unread")
