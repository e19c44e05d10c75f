"""Who reads a request, decided by rank 0 of a prefill server and the same on all its ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sglang_dualpath.hicache.ranks import Ranks
from sglang_dualpath.reader.offers import OfferDesk
from sglang_dualpath.reader.prefill_read import Shares

_UNDECIDED = (0, 0, 0)
_NO_LIMIT = -1


class SharedPlans:
    """Carries rank 0's decisions to the other ranks, on the scheduler thread.

    Operations are decided one by one, once each, in SGLang's order, which is the same on every rank.
    """

    def __init__(self, desk: OfferDesk, ranks: Ranks) -> None:
        self._desk = desk
        self._ranks = ranks

    def agree(self, operations: Iterable[Any]) -> None:
        """Plan what rank 0 can plan by now. ``operations`` are those with host pages, their reads opened."""
        undecided = [one for one in operations if not getattr(one, "dualpath_planned", False)]
        if not undecided:
            return
        first = self._ranks.rank == 0
        proposed = [
            number
            for operation in undecided
            for number in (_encode(self._desk.propose(operation.dualpath_prefetch)) if first else _UNDECIDED)
        ]
        numbers = iter(self._ranks.of_first(proposed))
        for operation in undecided:
            shares = _decode(next(numbers), next(numbers), next(numbers))
            if shares is not None:
                operation.dualpath_planned = True
                self._desk.adopt(operation.dualpath_prefetch, shares)


def _encode(shares: Shares | None) -> tuple[int, int, int]:
    if shares is None:
        return _UNDECIDED
    limits = (shares.decode_pages, shares.prefill_pages)
    decode, prefill = (_NO_LIMIT if limit is None else limit for limit in limits)
    return 2 if shares.decode else 1, decode, prefill


def _decode(kind: int, decode_pages: int, prefill_pages: int) -> Shares | None:
    if kind == 0:
        return None
    decode, prefill = (None if limit == _NO_LIMIT else limit for limit in (decode_pages, prefill_pages))
    return Shares(kind == 2, decode, prefill)
