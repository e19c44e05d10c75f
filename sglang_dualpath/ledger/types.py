"""Values of the ledger. All frozen: they may be handed between threads.

A *page* is always an absolute page index of the prompt; a *slot* is a host page number of the prefill engine's host
pool.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class End(enum.Enum):
    """The end of the read from which a reader claims. Both ends may reach every page."""

    FRONT = "front"
    BACK = "back"


class Source(enum.Enum):
    """Where a reader takes the pages of a grant from."""

    STORAGE = "storage"
    MEMORY = "memory"
    """The reader holds these pages in its own host memory: no storage read."""


class RefusalReason(enum.StrEnum):
    """Why a claim was refused."""

    MET = "met"
    """No unclaimed page that this reader may claim, and there will be none unless another claim fails."""
    RESERVED = "reserved"
    """The unclaimed pages are reserved for a reader that holds them in memory."""
    NO_SPARE = "no_spare"
    """No spare slot is free to back a write that may be late."""
    LIMIT = "limit"
    """The reader's share is used up."""
    CLOSED = "closed"
    """The read has ended."""
    LATE = "late"
    """The reader lost a lease, and its last word on that claim is still to come."""
    UNKNOWN_READER = "unknown_reader"
    """The reader never joined, or has left."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one reader may do in one read.

    `limit_pages` bounds the storage pages granted to it, counting those that fail later; pages from memory are free.
    `lease_s` is how long it may take for one claim if `exposed`, and how long a sign of life renews its reservation.
    `exposed` says that its writes are remote and may come late: each of its claimed pages is backed by a spare slot.
    """

    end: End
    limit_pages: int | None = None
    lease_s: float | None = None
    exposed: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """Pages `first_page .. end_page` are `reader`'s to land in `slots`, one slot a page, until `expires_s` if exposed.

    `claim_id` is unique in the process, so a late word on one read is never taken for a word on another.
    """

    claim_id: int
    reader: str
    first_page: int
    slots: tuple[int, ...]
    source: Source
    expires_s: float | None

    @property
    def pages(self) -> int:
        return len(self.slots)

    @property
    def end_page(self) -> int:
        return self.first_page + len(self.slots)


@dataclass(frozen=True, slots=True)
class Refusal:
    """No grant. `retry`: asking again later may succeed; otherwise the reader is done with this read."""

    reason: RefusalReason
    retry: bool


@dataclass(frozen=True, slots=True)
class Swap:
    """From `first_page` on, the destination of each page changed. The owner rewrites the prefetch's host indices."""

    first_page: int
    old_slots: tuple[int, ...]
    new_slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Expired:
    """A claim taken from its reader. `swap.old_slots` rest in the reserve until the writer's last word."""

    grant: Grant
    swap: Swap


@dataclass(frozen=True, slots=True)
class Landed:
    """What became of a reader's word on a claim.

    `pages` counts the pages that landed by it. `late`: the claim is not open any more. Then `grant` is the claim if it
    was taken from the reader (its old slots rest in the reserve: `Ledger.settle_late`), or None if it ended before or
    never was.
    """

    claim_id: int
    grant: Grant | None
    pages: int
    late: bool


@dataclass(frozen=True, slots=True)
class LedgerStatistics:
    """Counts of one read. granted = landed + open + reclaimed + abandoned, all in pages."""

    pages: int
    landed_pages: int
    landed_by_reader: Mapping[str, int]
    granted_pages: int
    memory_pages: int
    """Of the granted pages, those that the reader took from its memory."""
    open_pages: int
    reclaimed_pages: int
    """Granted, then unclaimed again: the reader failed or its lease ran out."""
    abandoned_pages: int
    """Granted, and still being written when the ledger was closed."""
    swapped_pages: int
    claims: int
    refusals: Mapping[RefusalReason, int]
