"""The ledger of one read: pages that readers claim from both ends, until they meet.

Every page is in exactly one state: unclaimed, claimed by one open claim, or landed. A reader that fails gives its pages
back and is barred from them, so each fault makes the set of possible claims smaller, and every read ends.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from types import MappingProxyType

from sglang_dualpath.ledger.readers import Reader
from sglang_dualpath.ledger.reserve import Reserve
from sglang_dualpath.ledger.spans import Run, Spans
from sglang_dualpath.ledger.types import (
    End,
    Expired,
    Grant,
    Landed,
    LedgerStatistics,
    Refusal,
    RefusalReason,
    Share,
    Source,
    Swap,
)

# One count for all ledgers of the process: a late word about one read never fits a claim of another.
_claim_ids = itertools.count(1)


class Ledger:
    """Pages `first_page .. first_page + len(slots)` of one prompt, to be landed in `slots` by any number of readers.

    A page has *failed* while it is unclaimed and no reader is left that may claim it. Upstream uses leading pages only,
    so no page behind a failed one is granted, and the read has *settled* once all pages before it landed. A settled
    ledger whose tail failed may still have open claims behind it: `close` it before its slots are freed.

    The ledger knows no time but the `now_s` of its callers, and no silence: who may claim is counted on until the owner
    says `leave` or `revoke`, a lease ran out (see `expire`), or a final refusal said so. Join the readers before asking
    whether the read has settled: without any, it has.

    Raises ValueError from any method for arguments that no correct caller passes; nothing has changed then.
    """

    def __init__(
        self,
        *,
        first_page: int,
        slots: Sequence[int],
        storage_end_page: int,
        reserve: Reserve,
        chunk_pages: int,
    ) -> None:
        """Pages from `storage_end_page` on are not in storage: only a reader that holds them in memory can land them.

        `chunk_pages` is the largest grant.
        """
        if chunk_pages < 1:
            raise ValueError(f"chunk_pages must be at least 1, not {chunk_pages}")
        self.first_page = first_page
        self.end_page = first_page + len(slots)
        self._slots = list(slots)
        self._storage = Spans(first_page, min(storage_end_page, self.end_page))
        self._reserve = reserve
        self._chunk_pages = chunk_pages
        self._unclaimed = Spans(first_page, self.end_page)
        self._landed = Spans()
        self._readers: dict[str, Reader] = {}
        self._open: dict[int, Grant] = {}
        self._exposed: set[int] = set()
        self._late: dict[int, Grant] = {}
        self._closed = False
        self._settled_short = False
        self._landed_by: Counter[str] = Counter()
        self._refusals: Counter[RefusalReason] = Counter()
        self._claims = self._granted_pages = self._memory_pages = 0
        self._reclaimed_pages = self._abandoned_pages = self._swapped_pages = 0

    # Readers come and go

    def join(self, reader: str, share: Share, *, local: bool = False) -> bool:
        """`reader` may claim from now on. False, and nothing happens, if the read has ended already.

        Joining again replaces the share and revives a reader that left; it stays barred from what it failed. `local` is
        the prefill engine's own reader, the one that is always there. It reads storage only. Its limit yields where
        nobody else may claim, so `limit_pages=0` makes it the fallback alone.
        """
        if local and share.exposed:
            raise ValueError("a local reader's writes are not exposed")
        if self._closed or self._settled_short or len(self._landed) == len(self._slots):
            return False
        known = self._readers.get(reader)
        if known is None:
            self._readers[reader] = Reader(reader, share, local)
        elif known.local != local:
            raise ValueError(f"reader {reader!r} cannot change between local and remote")
        else:
            known.share, known.active, known.suspended, known.resting = share, True, False, False
        return True

    def leave(self, reader: str, *, now_s: float) -> None:
        """`reader` claims no more, and its reservation ends. Its open claims stay open: they may still land."""
        known = self._readers.get(reader)
        if known is not None:
            known.leave()

    def counts_on(self, reader: str) -> bool:
        """Whether `reader` is waited for: it has joined, and neither left, lost a lease nor got a final refusal."""
        known = self._readers.get(reader)
        return known is not None and known.counted_on

    def reserve_range(self, reader: str, first: int, end: int, *, until_s: float) -> bool:
        """`reader` holds pages `first .. end` in memory. Until `until_s` nobody else may claim them who does not, too.

        Each grant and landing of the reader renews that by its lease. Afterwards it still takes them from memory, if
        they are unclaimed. False if the reader is unknown or has left.
        """
        known = self._readers.get(reader)
        if known is None or not known.active:
            return False
        if known.local:
            raise ValueError("the local reader reads storage only")
        held = Spans(max(first, self.first_page), min(end, self.end_page)).minus(known.barred)
        for run in held:
            known.held.add(*run)
        known.reserved_until_s = max(known.reserved_until_s, until_s)
        return True

    # Claims

    def claim(self, reader: str, *, max_pages: int | None, now_s: float) -> Grant | Refusal:
        """Grant `reader` the next run of pages at its end of the read.

        At most `max_pages` and `chunk_pages`. Pages that the reader holds in memory come first. Storage grants become
        smaller towards the end, so that readers of different speed finish together. An exposed grant is no larger than
        the reserve can back. A refusal without retry means that the reader is not counted on any more.
        """
        if max_pages is not None and max_pages < 1:
            raise ValueError(f"max_pages must be at least 1, not {max_pages}")
        answer = self._answer(reader, min(max_pages or self._chunk_pages, self._chunk_pages), now_s)
        if isinstance(answer, Refusal):
            self._refusals[answer.reason] += 1
        return answer

    def _answer(self, name: str, pages: int, now_s: float) -> Grant | Refusal:
        if self._closed:
            return Refusal(RefusalReason.CLOSED, retry=False)
        reader = self._readers.get(name)
        if reader is None or not (reader.active or reader.suspended):
            return Refusal(RefusalReason.UNKNOWN_READER, retry=False)
        if self._settled_short:
            return Refusal(RefusalReason.MET, retry=False)
        if reader.suspended:
            if any(grant.reader == name for grant in self._late.values()):
                return Refusal(RefusalReason.LATE, retry=True)
            reader.come_back()
        reader.resting = False
        useful = self._unclaimed.within(self.first_page, self._failed_from())
        held = useful.common(reader.held)
        if held:
            return self._grant(reader, held, pages, Source.MEMORY, now_s)
        pages_left = useful.common(self._storage).minus(reader.barred)
        if not pages_left:
            return self._refuse(reader, RefusalReason.MET)
        limit: float = reader.limit_left
        if not limit and reader.local:
            pages_left = self._without_others(pages_left)
            limit = len(pages_left)
        if not limit:
            return self._refuse(reader, RefusalReason.LIMIT)
        pages_left = self._unreserved(pages_left, now_s)
        if not pages_left:
            return Refusal(RefusalReason.RESERVED, retry=True)
        pages = int(min(pages, limit, self._taper(pages_left)))
        return self._grant(reader, pages_left, pages, Source.STORAGE, now_s)

    def _refuse(self, reader: Reader, reason: RefusalReason) -> Refusal:
        """Nothing for this reader. Others end here; the local one stays, for what they may yet fail."""
        if reader.local:
            return Refusal(reason, retry=self.first_page + self.landed_prefix() < self._failed_from())
        reader.resting = True
        return Refusal(reason, retry=False)

    def _grant(self, reader: Reader, spans: Spans, pages: int, source: Source, now_s: float) -> Grant | Refusal:
        first, end = spans.lowest if reader.share.end is End.FRONT else spans.highest
        pages = min(pages, end - first)
        exposed = reader.share.exposed
        if exposed:
            pages = min(pages, self._reserve.free)
            if not pages:
                reader.resting = not self._reserve.size
                return Refusal(RefusalReason.NO_SPARE, retry=not reader.resting)
            self._reserve.back(pages)
        first = first if reader.share.end is End.FRONT else end - pages
        slots = tuple(self._slots[first - self.first_page : first - self.first_page + pages])
        lease_s = reader.share.lease_s if exposed else None
        expires_s = None if lease_s is None else now_s + lease_s
        grant = Grant(next(_claim_ids), reader.name, first, slots, source, expires_s)
        self._unclaimed.remove(first, first + pages)
        self._open[grant.claim_id] = grant
        if exposed:
            self._exposed.add(grant.claim_id)
        reader.renew(now_s)
        self._claims += 1
        self._granted_pages += pages
        if source is Source.MEMORY:
            self._memory_pages += pages
        else:
            reader.storage_pages += pages
        return grant

    def _taper(self, spans: Spans) -> int:
        """Half of an equal part of what is left. A reader alone has nobody to wait for, and takes whole chunks."""
        sharing = sum(
            1
            for reader in self._readers.values()
            if reader.counted_on and reader.limit_left and spans.minus(reader.barred)
        )
        return math.ceil(len(spans) / (2 * sharing)) if sharing > 1 else len(spans)

    def _failed_from(self) -> int:
        """The lowest failed page, or the end."""
        failed = self._unclaimed
        for reader in self._readers.values():
            if reader.counted_on and failed:
                failed = failed.minus(reader.reach(self._storage))
        return failed.lowest[0] if failed else self.end_page

    def _without_others(self, spans: Spans) -> Spans:
        """Pages that no remote reader may claim, or none will for lack of spares until some late writer is heard."""
        for reader in self._readers.values():
            able = self._reserve.spares or not reader.share.exposed
            if not reader.local and reader.counted_on and able:
                spans = spans.minus(reader.reach(self._storage))
        return spans

    def _unreserved(self, spans: Spans, now_s: float) -> Spans:
        """Pages that no reader has reserved. (What the claiming reader holds is not in `spans`.)"""
        for reader in self._readers.values():
            if reader.counted_on and now_s < reader.reserved_until_s:
                spans = spans.minus(reader.held)
        return spans

    # Words on claims

    def land(self, claim_id: int, *, good_pages: int | None = None, now_s: float) -> Landed:
        """The writer's last word: the first `good_pages` pages of the claim landed (None: all), and it writes no more.

        The rest becomes unclaimed, and the reader is barred from it. A word on a claim that is not open changes
        nothing; see `Landed` and `settle_late`. After `close` no page counts as landed.
        """
        grant = self._open.get(claim_id)
        if grant is None:
            return Landed(claim_id, self._late.get(claim_id), 0, late=True)
        pages = grant.pages if good_pages is None else good_pages
        if not 0 <= pages <= grant.pages:
            raise ValueError(f"claim {claim_id} has {grant.pages} pages, not {pages}")
        del self._open[claim_id]
        if claim_id in self._exposed:
            self._exposed.remove(claim_id)
            self._reserve.unback(grant.pages)
        if self._closed:
            self._abandoned_pages += grant.pages
            return Landed(claim_id, grant, 0, late=False)
        if pages:
            self._landed.add(grant.first_page, grant.first_page + pages)
            self._landed_by[grant.reader] += pages
            self._readers[grant.reader].renew(now_s)
        self._reclaim(grant, grant.first_page + pages)
        return Landed(claim_id, grant, pages, late=False)

    def fail(self, claim_id: int, *, now_s: float) -> Landed:
        """The writer's last word: nothing of the claim landed. The same as `land` with no good page."""
        return self.land(claim_id, good_pages=0, now_s=now_s)

    def settle_late(self, claim_id: int) -> int:
        """The last word of a writer whose claim was taken away: its slots become spares. Returns how many."""
        self._late.pop(claim_id, None)
        return self._reserve.release(claim_id)

    def expire(self, *, now_s: float) -> list[Expired]:
        """Take away the exposed claims whose lease has run out. Their readers are suspended, and barred from them.

        Nobody counts on a suspended reader. It comes back with its next claim after the last words (`settle_late`) on
        all that it lost, three times at most.
        """
        overdue = [
            claim_id
            for claim_id in sorted(self._exposed)
            if (expires_s := self._open[claim_id].expires_s) is not None and expires_s <= now_s
        ]
        return [self._take_away(claim_id) for claim_id in overdue]

    def revoke(self, reader: str, *, now_s: float) -> list[Expired]:
        """Take away all exposed claims of a reader that is suspected or dead. It has left."""
        self.leave(reader, now_s=now_s)
        theirs = [claim_id for claim_id in sorted(self._exposed) if self._open[claim_id].reader == reader]
        return [self._take_away(claim_id) for claim_id in theirs]

    def close(self, *, now_s: float) -> list[Expired]:
        """End the read: nothing is granted or lands any more, and all exposed claims are taken away.

        Afterwards nobody remote writes to `slots`. The local reader may: wait until `open_local_claims` is 0 before
        they are freed. Closing again does nothing.
        """
        self._closed = True
        return [self._take_away(claim_id) for claim_id in sorted(self._exposed)]

    def _take_away(self, claim_id: int) -> Expired:
        grant = self._open.pop(claim_id)
        self._exposed.remove(claim_id)
        new_slots = self._reserve.swap(grant.slots, claim_id)
        first = grant.first_page - self.first_page
        self._slots[first : first + grant.pages] = new_slots
        self._late[claim_id] = grant
        self._swapped_pages += grant.pages
        if self._closed:
            self._abandoned_pages += grant.pages
        else:
            self._readers[grant.reader].suspend()
            self._reclaim(grant, grant.first_page)
        return Expired(grant, Swap(grant.first_page, grant.slots, new_slots))

    def _reclaim(self, grant: Grant, first: int) -> None:
        if first < grant.end_page:
            self._unclaimed.add(first, grant.end_page)
            self._readers[grant.reader].bar(first, grant.end_page)
            self._reclaimed_pages += grant.end_page - first

    # How far the read is

    def landed_prefix(self) -> int:
        """The number of leading pages that have landed."""
        if not self._landed:
            return 0
        first, end = self._landed.lowest
        return end - first if first == self.first_page else 0

    def settled_through(self, page_count: int) -> bool:
        """Whether the first `page_count` pages have landed, or no more of them will.

        Saying so of pages that failed is final: nobody may join or claim any more, so `landed_prefix` stays.
        """
        landed = self.landed_prefix()
        if self._closed or self._settled_short or landed >= min(page_count, len(self._slots)):
            return True
        self._settled_short = self.first_page + landed >= self._failed_from()
        return self._settled_short

    @property
    def slots(self) -> tuple[int, ...]:
        """The current destination of each page."""
        return tuple(self._slots)

    @property
    def span_left(self) -> Run:
        """The lowest unclaimed page and the end of the highest; twice the end of the read if all are claimed."""
        if not self._unclaimed:
            return self.end_page, self.end_page
        return self._unclaimed.lowest[0], self._unclaimed.highest[1]

    def pages_to_read(self, reader: str | None) -> int:
        """Unclaimed pages that are in storage and that `reader` (None: nobody) does not hold in memory."""
        left = self._unclaimed.common(self._storage)
        known = self._readers.get(reader) if reader is not None else None
        return len(left if known is None else left.minus(known.held))

    def open_grants(self) -> tuple[Grant, ...]:
        """The open claims, oldest first."""
        return tuple(self._open.values())

    def open_local_claims(self) -> int:
        """Open claims whose writes are not exposed: the owner waits for them before it frees the slots."""
        return len(self._open) - len(self._exposed)

    def statistics(self) -> LedgerStatistics:
        return LedgerStatistics(
            pages=len(self._slots),
            landed_pages=len(self._landed),
            landed_by_reader=MappingProxyType(dict(self._landed_by)),
            granted_pages=self._granted_pages,
            memory_pages=self._memory_pages,
            open_pages=sum(grant.pages for grant in self._open.values()),
            reclaimed_pages=self._reclaimed_pages,
            abandoned_pages=self._abandoned_pages,
            swapped_pages=self._swapped_pages,
            claims=self._claims,
            refusals=MappingProxyType(dict(self._refusals)),
        )
