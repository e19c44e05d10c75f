"""Asking the policy who reads a request, with what this prefill engine knows of itself and of its decode engines."""

from __future__ import annotations

import logging

import msgspec

from sglang_dualpath import metrics
from sglang_dualpath.policy import BalancingPolicy, ClusterView, EngineView, ReadRequest, Role, validate_plan
from sglang_dualpath.protocol import Done, Hello
from sglang_dualpath.reader.prefill import PrefillRead, PrefillReads
from sglang_dualpath.reader.prefill_read import ALONE, Shares

logger = logging.getLogger(__name__)


class Planner:
    """Plans reads. Every method is called with the lock of ``reads`` held."""

    def __init__(self, reads: PrefillReads, *, policy: BalancingPolicy, engine: str) -> None:
        self.engine = engine
        self._reads = reads
        self._policy = policy
        self._views: dict[bytes, EngineView] = {}

    @property
    def needs_decode(self) -> bool:
        """Asked anew each time: a policy may stand for another one."""
        return bool(self._policy.needs_decode)

    @property
    def reads_ahead(self) -> bool:
        return bool(getattr(self._policy, "reads_ahead", False))

    def note(self, peer: bytes, load: Hello | Done) -> None:
        """What a decode engine says of its load. ``peer`` is its engine id."""
        engine = peer.decode("ascii")
        if load.read_bytes_per_s:
            self._reads.decode_rates[engine] = load.read_bytes_per_s
        self._views[peer] = EngineView(
            engine=engine,
            role=Role.DECODE,
            queued_read_bytes=load.queued_read_bytes,
            read_bytes_per_s=load.read_bytes_per_s,
            hop_bytes_per_s=load.hop_bytes_per_s,
        )

    def forget(self, peer: bytes) -> None:
        self._views.pop(peer, None)
        self._reads.decode_rates.pop(peer.decode("ascii", "replace"), None)  # a peer that is no engine, too

    def plan(self, read: PrefillRead, hello: Hello | None) -> Shares:
        """Who reads ``read``; the prefill engine alone if the policy fails."""
        request = self._request(read, hello)
        try:
            plan = validate_plan(self._policy.plan(request, self._view(request)), request)
        except Exception:
            logger.exception("Policy %s failed; the prefill server reads alone.", type(self._policy).__name__)
            metrics.FALLBACKS.add(reason="policy_error")
            return ALONE
        theirs = plan.share_of(request.decode) if request.decode is not None else None
        if theirs is None:
            return ALONE
        own = plan.share_of(self.engine)
        return Shares(True, theirs.limit_pages, 0 if own is None else own.limit_pages)

    def _request(self, read: PrefillRead, hello: Hello | None) -> ReadRequest:
        held = 0
        if hello is not None:
            held = max(0, min(hello.held_end_page, read.prefetch.end_page) - read.prefetch.first_page)
        return ReadRequest(
            room=read.room or 0,
            prefill=self.engine,
            decode=hello.engine if hello is not None else None,
            hit_pages=read.prefetch.stored_pages,
            page_bytes=self._reads.pages.page_bytes,
            decode_held_pages=held,
            deadline_s=max(0.0, read.deadline_s - self._reads.clock()),
            chunk_bytes=self._reads.config.chunk_bytes,
        )

    def _view(self, request: ReadRequest) -> ClusterView:
        own = EngineView(
            engine=self.engine,
            role=Role.PREFILL,
            # The queue in front of this read: its own bytes are in the ledgers already.
            queued_read_bytes=max(0, self._reads.queued_read_bytes() - request.read_bytes),
            read_bytes_per_s=self._reads.rate.bytes_per_s,
            requests_in_flight=len(self._reads.reads),
        )
        decode = self._views.get(request.decode.encode()) if request.decode is not None else None
        if decode is not None:
            # What was offered since its last report counts, or all reads of a burst would go to the same side.
            offered = self._reads.offered_read_bytes(decode.engine)
            decode = msgspec.structs.replace(decode, queued_read_bytes=max(decode.queued_read_bytes, offered))
        return ClusterView([own] if decode is None else [own, decode])
