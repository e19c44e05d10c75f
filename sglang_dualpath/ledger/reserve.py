"""The spare host slots of one rank.

A remote write can be late: a lease runs out, another reader takes the pages over, and then the first writer's bytes
arrive. They must not arrive in memory that somebody else owns by then. So each rank takes a fixed number of spare slots
at start. Every page of an exposed claim is *backed* by a spare while the claim is open. If the claim has to be taken
away, its slots are *swapped* for spares, one for one, and rest in *quarantine* until the writer has said its last word.
The number of slots outside the host pool's own bookkeeping never changes, so all ranks go on allocating alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence


class Reserve:
    """A fixed number of spare slots, shared by all ledgers of one rank.

    Holds at all times: spares + quarantined = size; no slot is in both; backing <= spares. So an open exposed claim can
    always be swapped. Not thread-safe: one lock guards it together with the ledgers on it.
    """

    def __init__(self, slots: Sequence[int]) -> None:
        """`slots` are the owner's and in no other use. Raises ValueError if one is named twice."""
        if len(set(slots)) != len(slots):
            raise ValueError("a reserve needs distinct slots")
        self._size = len(slots)
        # First in, first out: a slot that came out of quarantine last is used again last.
        self._spares = deque(slots)
        self._quarantine: dict[Hashable, tuple[int, ...]] = {}
        self._backing = 0

    @property
    def size(self) -> int:
        return self._size

    @property
    def spares(self) -> int:
        """Slots that are not in quarantine, whether they back a claim or not."""
        return len(self._spares)

    @property
    def free(self) -> int:
        """Spares that back no claim."""
        return len(self._spares) - self._backing

    @property
    def backing(self) -> int:
        return self._backing

    @property
    def quarantined(self) -> int:
        return self._size - len(self._spares)

    def back(self, pages: int) -> bool:
        """Promise `pages` spares to an exposed claim. False, and nothing promised, if fewer are free."""
        if pages < 0:
            raise ValueError(f"cannot back {pages} pages")
        if pages > self.free:
            return False
        self._backing += pages
        return True

    def unback(self, pages: int) -> None:
        """Take back the promise: the claim ended with its writer's last word."""
        if not 0 <= pages <= self._backing:
            raise ValueError(f"cannot unback {pages} pages of {self._backing}")
        self._backing -= pages

    def swap(self, old_slots: Sequence[int], key: Hashable) -> tuple[int, ...]:
        """Exchange the slots of a backed claim for spares, using up their backing; returns one new slot for each.

        `old_slots` rest in quarantine under `key` until `release`. Raises ValueError, and changes nothing, if they were
        not backed or if `key` is in use.
        """
        if len(old_slots) > self._backing:
            raise ValueError(f"{len(old_slots)} slots to swap, but only {self._backing} backed")
        if key in self._quarantine:
            raise ValueError(f"quarantine key {key!r} is in use")
        if not old_slots:
            return ()
        new_slots = tuple(self._spares.popleft() for _ in old_slots)
        self._quarantine[key] = tuple(old_slots)
        self._backing -= len(old_slots)
        return new_slots

    def release(self, key: Hashable) -> int:
        """The writer of `key` writes no more (it said so, or is certainly dead): its slots become spares.

        Returns how many. An unknown key releases none, so that a word that comes twice does no harm.
        """
        slots = self._quarantine.pop(key, ())
        self._spares.extend(slots)
        return len(slots)

    def exposed_slots(self) -> frozenset[int]:
        """Slots into which a late write may still come."""
        return frozenset(slot for slots in self._quarantine.values() for slot in slots)

    def reseat(self, slots: Sequence[int]) -> None:
        """After the host pool was cleared: `slots` are the spares from now on. What rests in quarantine stays there.

        Raises ValueError, and changes nothing, unless `slots` are distinct, none is in quarantine, and the size stays.
        """
        if len(slots) != len(self._spares) or len(set(slots)) != len(slots):
            raise ValueError(f"reseating needs {len(self._spares)} distinct slots")
        if not self.exposed_slots().isdisjoint(slots):
            raise ValueError("a quarantined slot cannot be a spare")
        self._spares = deque(slots)
