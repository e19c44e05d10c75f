"""Who is granted what."""

from __future__ import annotations

import pytest

from sglang_dualpath.ledger import End, Ledger, RefusalReason, Reserve, Share, Source

from .conftest import LOCAL, REMOTE, settled


def test_the_front_reader_claims_the_lowest_pages(claim):
    assert [claim.span("de"), claim.span("de")] == [(100, 104), (104, 108)]


def test_the_back_reader_claims_the_highest_pages(claim):
    assert [claim.span("pe"), claim.span("pe")] == [(128, 132), (124, 128)]


def test_a_grant_names_the_slots_of_its_pages(claim):
    grant = claim("pe")
    assert (grant.slots, grant.pages, grant.source) == ((28, 29, 30, 31), 4, Source.STORAGE)


def test_a_reader_may_ask_for_less_than_a_chunk(claim):
    assert claim("de", 3).pages == 3


def test_no_grant_is_larger_than_a_chunk(claim):
    assert claim("de", 20).pages == 4


def test_a_claim_for_no_pages_is_an_error(ledger):
    with pytest.raises(ValueError, match="max_pages"):
        ledger.claim("de", max_pages=0, now_s=0.0)


def test_a_ledger_needs_chunks_of_at_least_a_page(empty_ledger):
    with pytest.raises(ValueError, match="chunk_pages"):
        empty_ledger(chunk_pages=0)


def test_grants_become_smaller_towards_the_meeting_point(open_ledger, claims_on):
    claim = claims_on(open_ledger(16))
    assert [claim(name).pages for name in ("de", "pe") * 4] == [4, 3, 3, 2, 1, 1, 1, 1]


def test_a_reader_alone_takes_whole_chunks_to_the_end(empty_ledger, claims_on):
    ledger = empty_ledger(10)
    ledger.join("pe", LOCAL, local=True)
    assert [claims_on(ledger)("pe").pages for _ in range(3)] == [4, 4, 2]


def test_a_reader_takes_whole_chunks_of_what_all_others_failed(open_ledger, claims_on):
    ledger = open_ledger(4)
    claim = claims_on(ledger)
    for _ in range(4):
        ledger.fail(claim("pe", 1).claim_id, now_s=0.0)
    assert claim("de").pages == 4


def test_claim_ids_differ_between_ledgers(open_ledger, claims_on):
    ids = [claims_on(open_ledger())("de").claim_id for _ in range(2)]
    assert ids[0] != ids[1]


def test_readers_that_met_are_told_so(open_ledger, claims_on):
    claim = claims_on(open_ledger(2))
    claim("pe")
    claim("de")
    assert claim.refused("de") == (RefusalReason.MET, False)


def test_the_local_reader_is_asked_to_come_back_while_others_may_fail(open_ledger, claims_on):
    claim = claims_on(open_ledger(2))
    claim("pe")
    claim("de")
    assert claim.refused("pe") == (RefusalReason.MET, True)


def test_after_all_pages_landed_nobody_needs_to_come_back(open_ledger, claims_on):
    claim = claims_on(open_ledger(1))
    claim.landed("de")
    assert claim.refused("pe") == (RefusalReason.MET, False)


def test_a_stranger_is_granted_nothing(claim):
    assert claim.refused("stranger") == (RefusalReason.UNKNOWN_READER, False)


def test_a_reader_that_left_is_granted_nothing(ledger, claim):
    ledger.leave("de", now_s=0.0)
    assert claim.refused("de") == (RefusalReason.UNKNOWN_READER, False)


def test_a_stranger_may_leave(ledger):
    ledger.leave("stranger", now_s=0.0)


def test_a_reader_that_left_may_join_again(ledger, claim):
    ledger.leave("de", now_s=0.0)
    assert ledger.join("de", REMOTE)
    assert claim.span("de") == (100, 104)


def test_a_reader_cannot_turn_from_remote_to_local(ledger):
    with pytest.raises(ValueError, match="cannot change"):
        ledger.join("de", LOCAL, local=True)


def test_a_local_reader_is_never_exposed(empty_ledger):
    with pytest.raises(ValueError, match="not exposed"):
        empty_ledger().join("pe", REMOTE, local=True)


def test_a_limit_ends_a_remote_readers_share(open_ledger, claims_on):
    claim = claims_on(open_ledger(remote=Share(End.FRONT, limit_pages=5, lease_s=1.0, exposed=True)))
    assert [claim("de").pages, claim("de").pages] == [4, 1]
    assert claim.refused("de") == (RefusalReason.LIMIT, False)


def test_a_limit_counts_pages_that_failed(open_ledger, claims_on):
    ledger = open_ledger(remote=Share(End.FRONT, limit_pages=4, lease_s=1.0, exposed=True))
    claim = claims_on(ledger)
    ledger.fail(claim("de").claim_id, now_s=0.0)
    assert claim.refused("de") == (RefusalReason.LIMIT, False)


def test_a_local_reader_at_its_limit_waits_while_a_remote_one_may_read(open_ledger, claims_on):
    claim = claims_on(open_ledger(local=Share(End.BACK, limit_pages=0)))
    assert claim.refused("pe") == (RefusalReason.LIMIT, True)


def test_a_local_readers_limit_yields_when_the_remote_one_left(open_ledger, claims_on):
    ledger = open_ledger(local=Share(End.BACK, limit_pages=0))
    ledger.leave("de", now_s=0.0)
    assert claims_on(ledger).span("pe") == (128, 132)


def test_a_local_readers_limit_yields_on_pages_that_the_remote_one_failed(open_ledger, claims_on):
    ledger = open_ledger(local=Share(End.BACK, limit_pages=0))
    claim = claims_on(ledger)
    ledger.land(claim("de").claim_id, good_pages=1, now_s=0.0)
    assert claim.span("pe") == (101, 104)


def test_a_local_readers_limit_yields_while_the_whole_reserve_is_in_quarantine(open_ledger, claims_on, reserve):
    reserve.back(16)
    reserve.swap(range(500, 516), "somebody late")
    claim = claims_on(open_ledger(local=Share(End.BACK, limit_pages=0)))
    assert claim.refused("de") == (RefusalReason.NO_SPARE, True)
    assert claim.span("pe") == (128, 132)


def test_an_exposed_grant_is_backed_by_spares(claim, reserve):
    claim("de")
    assert reserve.backing == 4


def test_a_local_grant_needs_no_spares_and_does_not_expire(claim, reserve):
    assert claim("pe").expires_s is None
    assert reserve.backing == 0


def test_an_exposed_grant_expires_after_its_lease(claim):
    assert claim("de", now_s=5.0).expires_s == 6.0


def test_an_exposed_grant_is_no_larger_than_the_reserve_can_back(claim, reserve):
    reserve.back(14)
    assert claim("de").pages == 2


def test_without_a_free_spare_an_exposed_reader_comes_back_later(claim, reserve):
    reserve.back(16)
    assert claim.refused("de") == (RefusalReason.NO_SPARE, True)


def test_without_any_reserve_an_exposed_reader_need_not_come_back():
    ledger = Ledger(first_page=0, slots=range(4), storage_end_page=4, reserve=Reserve([]), chunk_pages=4)
    ledger.join("de", REMOTE)
    answer = ledger.claim("de", max_pages=None, now_s=0.0)
    assert (answer.reason, answer.retry, settled(ledger)) == (RefusalReason.NO_SPARE, False, True)


def test_the_reserve_is_shared_between_ledgers(open_ledger, claims_on, reserve):
    readers = [claims_on(open_ledger()) for _ in range(5)]
    for claim in readers[:4]:
        claim("de")
    assert reserve.free == 0
    assert readers[4].refused("de") == (RefusalReason.NO_SPARE, True)


def test_span_left_bounds_what_nobody_has_claimed(ledger, claim):
    claim("de")
    claim("pe")
    assert ledger.span_left == (104, 128)


def test_span_left_is_empty_at_the_end_when_all_is_claimed(open_ledger, claims_on):
    ledger = open_ledger(1)
    claims_on(ledger)("de")
    assert ledger.span_left == (101, 101)


def test_open_grants_are_those_without_a_last_word(ledger, claim):
    first, second, third = claim("de"), claim("pe"), claim("de")
    ledger.land(first.claim_id, now_s=0.0)
    assert ledger.open_grants() == (second, third)


def test_statistics_account_for_every_granted_page(ledger, claim):
    claim.landed("pe")
    ledger.land(claim("de").claim_id, good_pages=3, now_s=0.0)
    claim("pe")
    claim.refused("stranger")
    stats = ledger.statistics()
    assert stats.landed_by_reader == {"pe": 4, "de": 3}
    assert (stats.granted_pages, stats.landed_pages, stats.open_pages, stats.reclaimed_pages) == (12, 7, 4, 1)
    assert (stats.claims, stats.refusals) == (3, {RefusalReason.UNKNOWN_READER: 1})
