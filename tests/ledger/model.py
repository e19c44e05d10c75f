"""A host pool with real contents, remote writers that write whenever they like, and a ledger's rules page by page.

The model is slow and obvious: it asks every question of every page, where the ledger keeps runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from sglang_dualpath.ledger import Expired, Grant, Ledger, Reserve, Share, Source

Token = tuple[int, int]
"""What a writer writes into a slot: (absolute page, claim id)."""


class Spec(NamedTuple):
    """A read to open, and the shares of its first readers."""

    first_page: int
    pages: int
    beyond_storage: int
    chunk_pages: int
    local: dict[str, Share]
    remotes: dict[str, Share]


@dataclass(eq=False)
class Writer:
    """A reader at work on one claim. It may write any page of it at any time until its last word."""

    read: Read
    grant: Grant
    exposed: bool
    taken_away: bool = False


@dataclass
class ModelReader:
    share: Share
    local: bool
    active: bool = True
    suspended: bool = False
    comebacks_left: int = 3
    resting: bool = False
    storage_pages: int = 0
    held: set[int] = field(default_factory=set)
    barred: set[int] = field(default_factory=set)

    def may_claim(self, page: int, storage_end: int) -> bool:
        if not self.active or self.resting or page in self.barred:
            return False
        limit = self.share.limit_pages
        can_read = self.local or limit is None or self.storage_pages < limit
        return page in self.held or (page < storage_end and can_read)


class Read:
    """One prefetch: its host indices, its ledger, and what the ledger should say about each page."""

    def __init__(self, first_page: int, slots: list[int], storage_end: int, reserve: Reserve, chunk: int) -> None:
        self.ledger = Ledger(
            first_page=first_page,
            slots=slots,
            storage_end_page=storage_end,
            reserve=reserve,
            chunk_pages=chunk,
        )
        self.first_page = first_page
        self.end_page = first_page + len(slots)
        self.storage_end = storage_end
        self.slots = list(slots)
        self.state: dict[int, Writer | Token | None] = dict.fromkeys(range(first_page, self.end_page))
        self.readers: dict[str, ModelReader] = {}
        self.landed_by: dict[str, int] = {}
        self.faults = 0
        self.settled_short = False
        self.closed = False

    def slot(self, page: int) -> int:
        return self.slots[page - self.first_page]

    def landed(self, page: int) -> bool:
        return isinstance(self.state[page], tuple)

    def landed_prefix(self) -> int:
        count = 0
        while self.first_page + count < self.end_page and self.landed(self.first_page + count):
            count += 1
        return count

    def failed_from(self) -> int:
        for page, state in self.state.items():
            if state is None and not any(r.may_claim(page, self.storage_end) for r in self.readers.values()):
                return page
        return self.end_page

    def settled(self) -> bool:
        return self.closed or self.settled_short or self.first_page + self.landed_prefix() >= self.failed_from()

    def granted(self, grant: Grant) -> Writer:
        reader = self.readers[grant.reader]
        pages = range(grant.first_page, grant.end_page)
        assert pages, "an empty grant"
        assert all(self.state[page] is None for page in pages), "a page was granted twice without a fault"
        assert reader.barred.isdisjoint(pages), "a reader was granted what it had failed"
        assert grant.end_page <= self.failed_from(), "a page behind a failed one was granted"
        assert grant.slots == tuple(self.slot(page) for page in pages)
        if grant.source is Source.MEMORY:
            assert reader.held.issuperset(pages)
        else:
            assert reader.held.isdisjoint(pages)
            assert grant.end_page <= self.storage_end
            reader.storage_pages += grant.pages
            limit = reader.share.limit_pages
            assert reader.local or limit is None or reader.storage_pages <= limit
        writer = Writer(self, grant, exposed=reader.share.exposed)
        for page in pages:
            self.state[page] = writer
        return writer

    def reclaimed(self, grant: Grant, first: int) -> None:
        for page in range(first, grant.end_page):
            self.state[page] = None
            self.readers[grant.reader].barred.add(page)
            self.readers[grant.reader].held.discard(page)
            self.faults += 1

    def left(self, reader: str) -> None:
        known = self.readers[reader]
        known.active = known.suspended = False
        known.held = set()

    def lost_a_lease(self, reader: str) -> None:
        known = self.readers[reader]
        if known.active and known.comebacks_left:
            known.active, known.suspended = False, True
        elif known.active:
            self.left(reader)

    def comes_back(self, reader: str) -> None:
        known = self.readers[reader]
        known.active, known.suspended = True, False
        known.comebacks_left -= 1

    def taken_away(self, expired: Expired, writer: Writer) -> None:
        swap, grant = expired.swap, expired.grant
        assert writer.exposed
        assert not writer.taken_away
        assert swap.first_page == grant.first_page
        assert swap.old_slots == grant.slots == tuple(self.slot(p) for p in range(grant.first_page, grant.end_page))
        assert len(swap.new_slots) == grant.pages
        writer.taken_away = True
        for index, slot in enumerate(swap.new_slots):
            self.slots[grant.first_page - self.first_page + index] = slot
        if not self.closed:
            self.lost_a_lease(grant.reader)
            self.reclaimed(grant, grant.first_page)
