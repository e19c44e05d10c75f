"""Both engines read one request, from its two ends, and meet where their speeds decide."""

from sglang_dualpath.policy.types import ClusterView, EngineView, ReadPlan, ReadRequest, ReadShare, prefill_alone


class SplitPolicy:
    """Shares every read, except one that the prefill engine ends sooner than a chunk over the decode engine takes.

    That exception is an estimate by measured rates: while any of the three rates is unknown the read is shared, since
    claims are pulled and a reader that is late claims nothing. What the decode engine holds in memory is always
    shared: it costs no storage NIC anything.
    """

    needs_decode = True
    reads_ahead = True

    def plan(self, read: ReadRequest, view: ClusterView) -> ReadPlan:
        if read.decode is None:
            return prefill_alone(read, "decode engine unknown")
        if read.decode_held_pages == 0:
            alone_s = _prefill_alone_s(read, view)
            first_chunk_s = _first_decode_chunk_s(read, read.decode, view)
            if alone_s is not None and first_chunk_s is not None and alone_s <= first_chunk_s:
                return prefill_alone(read, f"read alone in {alone_s:.4f} s, first hop after {first_chunk_s:.4f} s")
        return ReadPlan((ReadShare(read.decode, "front"), ReadShare(read.prefill, "back")), "policy split")


def _prefill_alone_s(read: ReadRequest, view: ClusterView) -> float | None:
    """Seconds until the prefill engine alone has read everything, its queue included; None if its rate is unknown."""
    rate = _rate(view.get(read.prefill))
    if rate is None:
        return None
    return (view.queued_read_bytes(read.prefill) + read.read_bytes) / rate


def _first_decode_chunk_s(read: ReadRequest, decode: str, view: ClusterView) -> float | None:
    """Seconds that a chunk takes over the decode engine; None if one of its rates is unknown.

    Its queue does not count: it drains other reads together with the prefill engine, and if it comes too late to this
    one, it finds nothing left to claim.
    """
    engine = view.get(decode)
    read_rate = _rate(engine)
    if engine is None or read_rate is None or not engine.hop_bytes_per_s:
        return None
    chunk_bytes = min(max(read.chunk_bytes, read.page_bytes), read.read_bytes)
    return chunk_bytes / read_rate + chunk_bytes / engine.hop_bytes_per_s


def _rate(engine: EngineView | None) -> float | None:
    # A measured rate of 0 says that nothing was measured, not that the NIC stands still.
    return engine.read_bytes_per_s or None if engine is not None else None
