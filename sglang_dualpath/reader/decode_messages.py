"""What prefill engines say to a decode engine, handled on its control thread with the lock held."""

from __future__ import annotations

import msgspec

from sglang_dualpath import metrics
from sglang_dualpath.protocol import (
    Bye,
    Cancel,
    Cancelled,
    Decline,
    Fail,
    Grant,
    Message,
    NoOffer,
    Offer,
    Queued,
    Refuse,
)
from sglang_dualpath.reader.decode_read import Chunk, DecodeRead, Phase
from sglang_dualpath.reader.decode_state import DecodeState


class DecodeMessages:
    """Offers, grants, refusals and cancels. Messages may be lost, come twice, or come after their read has ended."""

    def __init__(self, state: DecodeState) -> None:
        self._state = state

    def handle(self, endpoint: str, message: Message) -> None:
        """One message of the prefill engine at ``endpoint``."""
        read = self._state.reads.get(message.room)
        if read is None or read.endpoint != endpoint:
            self._answer_stranger(endpoint, message)
            return
        read.heard_s = self._state.clock()
        match message:
            case Offer():
                self._offer(read, message)
            case Grant():
                self._grant(read, message)
            case Refuse():
                self._refuse(read, message)
            case Cancel():
                self._cancel(read, message)
            case NoOffer():
                metrics.OFFERS.add(outcome=f"got_none_{message.reason.value}")
                self._state.end(read, f"no_offer_{message.reason.value}")
                if read.phase in (Phase.GREETING, Phase.OFFERED):
                    self._state.settle(read)
            case Queued():
                pass
            case _:
                metrics.CONTROL_ERRORS.add(kind="unexpected_message")
        self._state.lock.notify_all()

    def _answer_stranger(self, endpoint: str, message: Message) -> None:
        """A read that this engine no longer knows writes nothing any more: say so, or the other side waits for it."""
        if isinstance(message, Cancel | Grant) and message.claim_id is not None:
            self._cancelled(endpoint, message, message.claim_id)
        elif isinstance(message, Offer):
            self._state.send(endpoint, Bye(message.room, message.attempt))

    def _cancelled(self, endpoint: str, message: Cancel | Grant, claim_id: int) -> None:
        """Nothing is written for this claim, unless its last word is owed by whoever has it in hand."""
        if (endpoint, claim_id) not in self._state.in_hand:
            self._state.send(endpoint, Cancelled(message.room, message.attempt, claim_id))

    # -- offers --------------------------------------------------------------------------------------------------------

    def _offer(self, read: DecodeRead, offer: Offer) -> None:
        if read.offer is not None and read.offer.attempt == offer.attempt:
            return  # delivered twice
        if read.phase is not Phase.GREETING or read.ended is not None:
            self._state.say(read, Decline(read.room, offer.attempt, "settled"))
            return
        problem = self._why_not(read, offer)
        if problem is not None:
            self._state.say(read, Decline(read.room, offer.attempt, problem))
            self._state.fall_back(read, problem)
            self._state.settle(read)
            return
        assert read.endpoint is not None
        target = self._state.sessions.complete(read.endpoint, offer.target)
        read.offer = msgspec.structs.replace(offer, target=target)
        read.phase = Phase.OFFERED
        read.order = next(self._state.offers)
        read.memory_left = max(0, min(len(read.held_slots), offer.end_page) - offer.first_page)
        metrics.OFFERS.add(outcome="got")
        self._state.pump()

    def _why_not(self, read: DecodeRead, offer: Offer) -> str | None:
        if read.match_pages < offer.first_page:
            return "prefix_gap"
        known = read.held_hashes
        if offer.end_page <= len(known) and known[offer.end_page - 1] != offer.end_hash:
            return "prompt_differs"
        ours = [plane.page_bytes for plane in self._state.pages.planes]
        if [plane.page_bytes for plane in offer.target.planes] != ours:
            return "page_layout"
        return None

    # -- claims --------------------------------------------------------------------------------------------------------

    def _grant(self, read: DecodeRead, grant: Grant) -> None:
        asked = read.requested.pop(grant.request_id, None)
        if (read.endpoint, grant.claim_id) in self._state.in_hand:
            return  # delivered twice; the first one is at work and will have its last word
        unwanted = asked is None or grant.claim_id in read.cancelled
        if unwanted or read.ended is not None or read.offer is None or grant.attempt != read.attempt:
            self._state.say(read, Cancelled(read.room, grant.attempt, grant.claim_id))
            return
        problem = _out_of_range(read, grant)
        if problem is not None:
            metrics.CONTROL_ERRORS.add(kind="grant_out_of_range")
            self._state.say(read, Fail(read.room, grant.attempt, grant.claim_id, problem))
            self._state.fall_back(read, "bad_grant")
            return
        if not grant.memory and not _has_host_pages(read, grant):
            # Others took what is held in memory here, or the prefetch was given a later start: not this engine's to do.
            read.memory_left = 0
            self._state.say(read, Cancelled(read.room, grant.attempt, grant.claim_id))
            self._state.pump()
            return
        if grant.memory:
            read.memory_left -= len(grant.slots)
        lease_s = min(grant.lease_s, self._state.config.lease_s)
        self._state.in_hand.add((read.endpoint, grant.claim_id))
        read.granted.append(Chunk(read, grant, self._state.clock() + lease_s))

    def _refuse(self, read: DecodeRead, refuse: Refuse) -> None:
        if read.requested.pop(refuse.request_id, None) is None or refuse.attempt != read.attempt:
            return
        if refuse.retry:
            read.claim_again_s = self._state.clock() + refuse.retry_after_s
        else:
            self._state.claim_no_more(read, f"refused_{refuse.reason}")

    def _cancel(self, read: DecodeRead, cancel: Cancel) -> None:
        def meant(chunk: Chunk) -> bool:
            return chunk.grant.attempt == cancel.attempt and cancel.claim_id in (None, chunk.grant.claim_id)

        answered = False
        for chunk in [chunk for chunk in read.granted if meant(chunk)]:
            self._state.drop(chunk)
            answered = True
        for chunk in read.busy:
            if meant(chunk) and chunk.given_up is None:
                chunk.given_up = "cancelled by the prefill engine"
                chunk.lease_lost = cancel.claim_id is not None
        if cancel.claim_id is not None and not answered and read.endpoint is not None:
            # Unless it is in hand, its last word was said, and lost or late: say it again. Or its grant was overtaken.
            read.cancelled.add(cancel.claim_id)
            self._cancelled(read.endpoint, cancel, cancel.claim_id)
        # A claim alone is cancelled when its lease has run out, and others may be granted as long as the read is open.
        # When the read ends, too; then NoOffer follows.
        if cancel.claim_id is None and cancel.attempt == read.attempt:
            self._state.end(read, "cancelled_by_prefill")


def _out_of_range(read: DecodeRead, grant: Grant) -> str | None:
    """What is wrong with a grant that no prefill engine of ours would send, or None."""
    offer = read.offer
    assert offer is not None
    pages = range(grant.first_page, grant.first_page + len(grant.slots))
    if pages.start < offer.first_page or pages.stop > offer.end_page:
        return "the grant lies outside the offer"
    if max(grant.slots) >= offer.target.slots:
        return "the grant names a slot outside the host pool"
    if grant.memory:
        return None if pages.stop <= len(read.held_slots) else "the grant names pages that are not held"
    if pages.stop > offer.storage_end_page:
        return "the grant names pages that are not in storage"
    # Read into pages that SGLang was told are complete, it might meet them freed.
    in_hand = [chunk for chunk in (*read.granted, *read.busy) if not chunk.grant.memory]
    again = any(chunk.first_page < pages.stop and pages.start < chunk.end_page for chunk in in_hand)
    if again or not read.landed.isdisjoint(pages):
        return "the grant names pages that were granted before"
    return None


def _has_host_pages(read: DecodeRead, grant: Grant) -> bool:
    prefetch = read.prefetch
    end_page = grant.first_page + len(grant.slots)
    if prefetch is None or prefetch.over:
        return False
    return prefetch.first_page <= grant.first_page and end_page <= prefetch.end_page
