"""Which read of a decode engine asks for the next chunk, and whose granted chunk is carried next."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from sglang_dualpath.config import DualPathConfig
from sglang_dualpath.protocol import Offer
from sglang_dualpath.reader.decode_read import Chunk, DecodeRead
from sglang_dualpath.reader.prefetch import Rate

# As claims in flight share the NIC, a chunk of three (two reader threads) then ends after about half of its lease,
# which leaves room for a busy machine.
_LEASE_SHARE = 0.16
# Before the first measurement: 2 MiB take 80 ms on a 200 Mbit/s link.
_FIRST_CHUNK_BYTES = 2 << 20


class ClaimPump:
    """The read that was opened first claims first, within three bounds.

    * ``claims_in_flight`` claims are asked for, wait for the reader or are being read, because a lease runs while a
      chunk waits. Those that a prefill engine has not answered for a lease do not count: a frozen one must not stop
      the others.
    * As many of chunks held in memory besides: these need no storage, so they neither wait for it nor take its turn.
    * Twice ``claims_in_flight`` per prefill engine in all, those that are being read and pushed included, because each
      is backed by a spare page of its.
    """

    def __init__(self, config: DualPathConfig) -> None:
        # One more than are read at a time, lest a reader waits for a grant.
        self._in_flight = max(config.claims_in_flight, config.reader_threads + 1)
        self._lease_s = config.lease_s
        self._limit_bytes_per_s = config.read_rate_limit_bytes_per_s

    def next_claims(self, reads: Mapping[int, DecodeRead], now_s: float) -> Iterator[DecodeRead]:
        """Reads that should send a claim, each as often as it should. The caller notes every claim before the next."""
        waiting = {False: 0, True: 0}
        per_engine: Counter[str | None] = Counter()
        for read in reads.values():
            per_engine[read.endpoint] += len(read.requested) + len(read.granted) + len(read.busy)
            for asked in read.requested.values():
                waiting[asked.memory] += now_s - asked.sent_s < self._lease_s
            for chunk in read.granted:
                waiting[chunk.grant.memory] += 1
            waiting[False] += sum(chunk.reading for chunk in read.busy)
        for read in reads.values():
            while (
                per_engine[read.endpoint] < self.claims_per_engine
                and waiting[read.memory_left > 0] < self._in_flight
                and _may_claim(read, now_s)
            ):
                per_engine[read.endpoint] += 1
                waiting[read.memory_left > 0] += 1
                yield read

    @property
    def claims_per_engine(self) -> int:
        """Claims that are open at once with one prefill engine, at most."""
        return 2 * self._in_flight

    def repeat_in_s(self, reads: Mapping[int, DecodeRead], now_s: float) -> float:
        """Seconds until a refused claim may be repeated; infinity if there is none."""
        waits = [read.claim_again_s - now_s for read in reads.values() if read.ended is None]
        return min((seconds for seconds in waits if seconds > 0), default=math.inf)

    def next_chunk(self, reads: Mapping[int, DecodeRead]) -> Chunk | None:
        """The granted chunk to carry next; those in memory first, as they only pass through the reader."""
        first: Chunk | None = None
        for read in reads.values():
            for chunk in read.granted:
                if chunk.grant.memory:
                    return chunk
                first = first or chunk
        return first

    def claim_pages(self, offer: Offer, rate: Rate, page_bytes: int) -> int:
        """Pages to ask for: what is offered, but no more than this engine reads in a small part of the lease.

        A chunk waits for the one before it, is read and pushed, all within its lease; and where the readers meet, the
        faster one waits for the slower one's last chunk.
        """
        if rate.bytes_per_s is None:
            size_bytes = float(_FIRST_CHUNK_BYTES)
        else:
            size_bytes = rate.bytes_per_s * offer.lease_s * _LEASE_SHARE
        if self._limit_bytes_per_s:
            # What is measured is reads alone, without the waits between them.
            size_bytes = min(size_bytes, self._limit_bytes_per_s * offer.lease_s * _LEASE_SHARE)
        return max(1, min(offer.chunk_pages, int(size_bytes / page_bytes)))


def _may_claim(read: DecodeRead, now_s: float) -> bool:
    if read.ended is not None or read.offer is None or now_s < read.claim_again_s:
        return False
    if any(chunk.lease_lost for chunk in read.busy):
        return False  # refused until the last word on it
    # Without host pages only what is held in memory can be served, one claim at a time: a second could be granted
    # pages that must be read.
    return read.takes_storage or (read.memory_left > 0 and not read.requested)
