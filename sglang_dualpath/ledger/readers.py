"""What a ledger knows of one reader."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sglang_dualpath.ledger.spans import Spans
from sglang_dualpath.ledger.types import Share


@dataclass(slots=True, eq=False)
class Reader:
    name: str
    share: Share
    local: bool
    active: bool = True
    """Has joined and not left."""
    suspended: bool = False
    """Lost a lease, so it is not active until it claims again, with all last words on what it lost said."""
    comebacks_left: int = 3
    """One that loses its lease more often costs more reads than it saves."""
    resting: bool = False
    """Was told to stop asking, so it is not counted on, unless it asks again nevertheless."""
    storage_pages: int = 0
    """Granted to it from storage so far."""
    held: Spans = field(default_factory=Spans)
    """Pages in its memory; never a barred one."""
    reserved_until_s: float = -math.inf
    barred: Spans = field(default_factory=Spans)
    """Pages that it failed, or lost by its lease."""

    @property
    def counted_on(self) -> bool:
        return self.active and not self.resting

    @property
    def limit_left(self) -> float:
        limit = self.share.limit_pages
        return math.inf if limit is None else max(0, limit - self.storage_pages)

    def reach(self, storage: Spans) -> Spans:
        """Pages that it may claim, now or later, if they are unclaimed. The local reader's limit yields in the end."""
        if self.local or self.limit_left:
            return storage.minus(self.barred).plus(self.held)
        return self.held

    def renew(self, now_s: float) -> None:
        """A sign of life."""
        if self.share.lease_s is not None:
            self.reserved_until_s = max(self.reserved_until_s, now_s + self.share.lease_s)

    def bar(self, first: int, end: int) -> None:
        self.barred.add(first, end)
        self.held.remove(first, end)

    def suspend(self) -> None:
        if self.active and not self.comebacks_left:
            self.leave()
        elif self.active:
            self.active, self.suspended = False, True

    def come_back(self) -> None:
        self.active, self.suspended = True, False
        self.comebacks_left -= 1

    def leave(self) -> None:
        self.active = self.suspended = False
        self.held = Spans()
