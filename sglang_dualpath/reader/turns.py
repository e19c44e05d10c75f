"""Which read the prefill engine's own readers take a chunk of next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from sglang_dualpath.reader.prefill_read import PrefillRead


def in_turn(reads: Iterable[PrefillRead], rates: Mapping[str, float], own_rate: float | None) -> list[PrefillRead]:
    """Open reads, the one first that the prefill engine should help next.

    That is the oldest, as SGLang ends prefetches in their order. But where several decode engines read, one that is
    always helped first runs dry first, and its NIC idles while others have much left. So another's reads come first
    when what the others will have left at that moment is as much as this engine reads until then: from there on its
    help, given to them alone, lets all end together.

    Args:
        reads: oldest first.
        rates: bytes per second that a decode engine reads; one that is not in it reads as fast as this engine.
        own_rate: bytes per second that this engine reads, None before the first read.
    """
    able = [read for read in reads if not read.closed and not read.prefetch.is_cancelled()]
    left: Counter[str] = Counter()
    for read in able:
        if read.decode is not None:
            first, end = read.ledger.span_left
            left[read.decode] += end - first
    head = next((read for read in able if read.ledger.span_left[0] < read.ledger.end_page), None)
    if head is None or head.decode is None or len(left) < 2:
        return able
    # Relative to this engine's rate: pages that a decode engine reads in the time of one of this engine's.
    speed = {engine: rates[engine] / own_rate if own_rate and rates.get(engine) else 1.0 for engine in left}
    dry_after = left[head.decode] / speed[head.decode]
    others = {engine: pages - speed[engine] * dry_after for engine, pages in left.items() if engine != head.decode}
    if sum(max(0.0, pages) for pages in others.values()) < dry_after:
        return able
    behind = max(others, key=lambda engine: others[engine] / speed[engine])
    return [read for read in able if read.decode == behind] + [read for read in able if read.decode != behind]
