"""What a decode engine knows of one request's read: its phase, what it asked for, and the chunks it was granted."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sglang_dualpath.protocol import Grant, Offer
from sglang_dualpath.reader.prefetch import Prefetch


class Phase(enum.Enum):
    """Where a request's read is. All but SETTLED hold back its bootstrap."""

    GREETING = "greeting"
    OFFERED = "offered"
    SUBMITTED = "submitted"
    READING = "reading"
    SETTLED = "settled"


class Answer(enum.IntEnum):
    """Whether SGLang can be asked for a prefetch of a read. Of several ranks the least counts."""

    NONE = 0
    """There is nothing to prefetch, or not any more."""
    LATER = 1
    """The prefill engine has not answered yet, or there is no room now."""
    OFFER = 2


NOT_OFFERED = 1 << 62
"""More offers than ever come."""


class Standing(NamedTuple):
    """What one rank knows of a read. All ranks act on the least of each, so that they prefetch the same or nothing."""

    answer: int
    """An :class:`Answer`."""
    end_page: int
    """End of the offered pages that are in storage."""
    minus_first_page: int
    """The first offered page, negative: the least over the ranks is where the last of them begins."""
    order: int
    """Offers that came before its own, :data:`NOT_OFFERED` without one."""
    over: int
    """1 when nothing of the read will touch host memory any more."""


class Asked(NamedTuple):
    """A claim without an answer."""

    sent_s: float
    memory: bool
    """Pages from memory were still to be had when it was sent."""


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
    given_up: str | None = None
    """Why its pages may not be counted on any more as the source of a push: it ends without a landing."""
    lease_lost: bool = False
    """Others have its pages by now. What it reads is still this engine's to keep, and the read goes on."""
    overdue_s: float | None = None
    """When its push was first seen to outlast its lease."""

    @property
    def first_page(self) -> int:
        return self.grant.first_page

    @property
    def end_page(self) -> int:
        return self.grant.first_page + len(self.grant.slots)

    def holds(self, now_s: float) -> bool:
        """Its host pages must stay as they are: a read writes into them, or a push may still count."""
        return self.reading or (self.given_up is None and now_s < self.deadline_s)


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
    """When its prefill engine last said anything, or was asked first; infinite before that."""
    phase: Phase = Phase.GREETING
    offer: Offer | None = None
    order: int = NOT_OFFERED
    """Offers that this engine got before."""
    prefetch: Prefetch | None = None
    ended: str | None = None
    """Why no more is claimed; None while more may be. What was granted before may still be on its way."""
    granted: deque[Chunk] = field(default_factory=deque)
    requested: dict[int, Asked] = field(default_factory=dict)
    """Claims without an answer, by request id."""
    busy: list[Chunk] = field(default_factory=list)
    """Chunks that a thread reads or pushes."""
    landed: set[int] = field(default_factory=set)
    """Pages (absolute) that this engine has read into its own host pages."""
    memory_left: int = 0
    """Pages of the offer that are held in memory and were not granted yet."""
    parked_until_s: float = 0.0
    """When SGLang is asked again for the prefetch, 0 as long as it has found room."""
    claim_again_s: float = 0.0
    abandoned: bool = False
    """A flush came over it: the scheduler asks for it no more."""
    leases_lost: int = 0
    """Chunks that were late by this engine's own clock."""
    cancelled: set[int] = field(default_factory=set)
    """Claims that were cancelled while they were not waiting here. The grant of one may have been overtaken."""

    @property
    def attempt(self) -> int:
        return self.offer.attempt if self.offer is not None else 0

    @property
    def over(self) -> bool:
        """Nothing of this read will touch host memory any more."""
        return self.ended is not None and not self.granted and not self.busy

    @property
    def takes_storage(self) -> bool:
        """It has host pages to read into."""
        return self.prefetch is not None and not self.prefetch.over

    @property
    def through(self) -> bool:
        """It has been offered pages, and has had all that it can serve."""
        awaits_pages = self.phase in (Phase.OFFERED, Phase.SUBMITTED)
        idle = not self.requested and not self.granted
        return self.offer is not None and idle and self.memory_left <= 0 and not self.takes_storage and not awaits_pages

    def kept_pages(self) -> int:
        """Leading pages of the prefetch that are in its host pages."""
        if self.prefetch is None:
            return 0
        page = self.prefetch.first_page
        while page in self.landed:
            page += 1
        return page - self.prefetch.first_page

    @property
    def reads_no_more(self) -> bool:
        """No more pages will be read into its host pages."""
        return self.ended is not None and not self.granted and not any(chunk.reading for chunk in self.busy)

    def storage_chunks(self) -> Iterable[Chunk]:
        """Busy chunks that use the prefetch's host pages."""
        return (chunk for chunk in self.busy if not chunk.grant.memory)
