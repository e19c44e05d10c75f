"""Which read the prefill engine's own readers take a chunk of next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from sglang_dualpath.reader.prefill_read import PrefillRead


def in_turn(
    reads: Iterable[PrefillRead], rates: Mapping[str, float], own_rate: float | None, *, now_s: float
) -> list[PrefillRead]:
    """Open reads with anything unclaimed, the one first that the prefill engine should help next.

    Not those past their deadline: such a read ends as soon as it is waited for, and would have to wait for a chunk
    that is begun now.

    That is the oldest, as SGLang ends prefetches in their order. But where several decode engines read, or none reads
    some, the one that is always helped first runs dry first, and its NIC idles while others have much left. So reads
    of a decode engine that ends its own before all can have ended come last. That ends the last read as early as can
    be, at the price of the oldest, which all behind it wait for: NICs that work count more than the mean time of a
    few reads.

    Work that a decode engine has for other prefill engines is not known here, and not counted.

    Args:
        reads: oldest first.
        rates: bytes per second that a decode engine reads; one that is not in it reads as fast as this engine.
        own_rate: bytes per second that this engine reads, None before the first read.
        now_s: time by the clock that the reads' deadlines are of.
    """
    able = [read for read in reads if now_s < read.deadline_s and not read.closed and not read.prefetch.is_cancelled()]
    able = [read for read in able if read.ledger.span_left[0] < read.ledger.end_page]
    helpers = {read: _helper(read) for read in able}
    if len(set(helpers.values())) < 2:
        return able
    left: Counter[str | None] = Counter()
    for read, helper in helpers.items():
        left[helper] += read.ledger.pages_to_read(helper)
    # What nobody else reads is this engine's anyway.
    alone = left.pop(None, 0)
    # Relative to this engine's rate: pages that a decode engine reads in the time of one of this engine's.
    speed = {engine: (rates.get(engine or "", 0.0) / own_rate if own_rate else 0.0) or 1.0 for engine in left}
    by_itself = {engine: pages / speed[engine] for engine, pages in left.items()}
    ends = _all_ends(alone, [(left[engine], speed[engine]) for engine in sorted(left, key=lambda e: -by_itself[e])])
    early = {engine for engine, dry in by_itself.items() if dry <= ends}
    return sorted(able, key=lambda read: helpers[read] in early)  # stable


def _helper(read: PrefillRead) -> str | None:
    """The decode engine that reads, too, unless it has lost its lease or has ended."""
    return read.decode if read.decode is not None and read.ledger.counts_on(read.decode) else None


def _all_ends(alone: float, left: Iterable[tuple[float, float]]) -> float:
    """When all can have ended: ``alone`` pages at speed 1, which also helps with ``left``, pages and speed of others.

    The earliest T for which ``alone`` and what the others have not read by then are no more than T. The others come
    with the one first that takes longest by itself: those it needs help for are some of the first.
    """
    pages, speed, ends = alone, 1.0, alone
    for more, faster in left:
        pages, speed = pages + more, speed + faster
        ends = max(ends, pages / speed)
    return ends
