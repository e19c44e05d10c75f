"""What a reader's word on its claim does, and how far the read is then."""

from __future__ import annotations

import pytest

from sglang_dualpath.ledger import RefusalReason

from .conftest import LOCAL, REMOTE, settled


def test_landed_pages_count_for_their_reader(ledger, claim):
    landed = ledger.land(claim("de").claim_id, now_s=0.0)
    assert (landed.pages, landed.late) == (4, False)
    assert ledger.statistics().landed_by_reader == {"de": 4}


def test_the_landed_prefix_ends_at_the_first_page_that_has_not_landed(ledger, claim):
    first, second = claim("de"), claim("de")
    ledger.land(second.claim_id, now_s=0.0)
    assert ledger.landed_prefix() == 0
    ledger.land(first.claim_id, now_s=0.0)
    assert ledger.landed_prefix() == 8


def test_a_last_word_frees_the_spares(ledger, claim, reserve):
    ledger.land(claim("de").claim_id, now_s=0.0)
    ledger.fail(claim("de").claim_id, now_s=0.0)
    assert reserve.free == reserve.size


def test_pages_after_the_good_ones_are_unclaimed_again(ledger, claim):
    landed = ledger.land(claim("de").claim_id, good_pages=1, now_s=0.0)
    assert landed.pages == 1
    assert ledger.span_left == (101, 132)


def test_a_reader_is_barred_from_what_it_failed(ledger, claim):
    ledger.fail(claim("de").claim_id, now_s=0.0)
    assert claim.span("de") == (104, 108)


def test_another_reader_takes_over_what_one_failed(open_ledger, claims_on):
    ledger = open_ledger(4)
    claim = claims_on(ledger)
    ledger.fail(claim("de").claim_id, now_s=0.0)
    while ledger.landed_prefix() < 4:
        claim.landed("pe")
    assert settled(ledger)


@pytest.mark.parametrize("good_pages", [-1, 5])
def test_more_good_pages_than_granted_are_an_error_and_change_nothing(ledger, claim, good_pages):
    grant = claim("de")
    with pytest.raises(ValueError, match="has 4 pages"):
        ledger.land(grant.claim_id, good_pages=good_pages, now_s=0.0)
    assert ledger.open_grants() == (grant,)


def test_a_word_that_comes_twice_changes_nothing(ledger, claim):
    grant = claim.landed("de")
    again = ledger.land(grant.claim_id, good_pages=0, now_s=0.0)
    assert (again.late, again.grant, again.pages) == (True, None, 0)
    assert ledger.landed_prefix() == 4


def test_a_word_on_an_unknown_claim_changes_nothing(ledger):
    assert ledger.land(-1, now_s=0.0).late
    assert ledger.landed_prefix() == 0


def test_a_claim_of_a_reader_that_left_may_still_land(ledger, claim):
    grant = claim("de")
    ledger.leave("de", now_s=0.0)
    assert ledger.land(grant.claim_id, now_s=0.0).pages == 4


def test_a_read_settles_when_all_pages_landed(open_ledger, claims_on):
    ledger = open_ledger(2)
    claim = claims_on(ledger)
    claim.landed("de")
    assert not settled(ledger)
    claim.landed("pe")
    assert settled(ledger)


def test_an_empty_read_is_settled(open_ledger, reserve, empty_ledger):
    ledger = empty_ledger(0)
    assert (settled(ledger), ledger.landed_prefix(), ledger.join("pe", LOCAL, local=True)) == (True, 0, False)


def test_leading_pages_settle_before_the_rest(ledger, claim):
    claim.landed("de")
    assert ledger.settled_through(4)
    assert not ledger.settled_through(5)
    assert claim.span("de") == (104, 108)


def test_a_page_that_all_readers_failed_ends_the_read_before_it(empty_ledger, claims_on):
    ledger = empty_ledger(8)
    ledger.join("pe", LOCAL, local=True)
    claim = claims_on(ledger)
    ledger.land(claim("pe").claim_id, good_pages=2, now_s=0.0)
    assert not settled(ledger)
    claim.landed("pe")
    assert (settled(ledger), ledger.landed_prefix()) == (True, 6)


def test_nothing_behind_a_failed_page_is_granted(empty_ledger, claims_on):
    ledger = empty_ledger(8)
    ledger.join("front", REMOTE)
    claim = claims_on(ledger)
    ledger.fail(claim("front").claim_id, now_s=0.0)
    assert claim.refused("front") == (RefusalReason.MET, False)
    assert (settled(ledger), ledger.landed_prefix()) == (True, 0)


def test_a_failed_page_does_not_end_the_read_before_earlier_claims_end(empty_ledger, claims_on):
    ledger = empty_ledger(8)
    ledger.join("pe", LOCAL, local=True)
    claim = claims_on(ledger)
    late, early = claim("pe"), claim("pe")
    ledger.fail(late.claim_id, now_s=0.0)
    assert not settled(ledger)
    ledger.land(early.claim_id, now_s=0.0)
    assert (settled(ledger), ledger.landed_prefix()) == (True, 4)


def test_a_reader_that_joins_in_time_revives_a_failed_page(empty_ledger, claims_on):
    ledger = empty_ledger(4)
    ledger.join("pe", LOCAL, local=True)
    claim = claims_on(ledger)
    ledger.fail(claim("pe").claim_id, now_s=0.0)
    assert ledger.join("de", REMOTE)
    assert not settled(ledger)
    assert claim.landed("de").pages == 4


def test_nobody_joins_once_the_read_was_said_to_have_settled_short(empty_ledger, claims_on):
    ledger = empty_ledger(4)
    ledger.join("pe", LOCAL, local=True)
    claim = claims_on(ledger)
    ledger.fail(claim("pe").claim_id, now_s=0.0)
    assert settled(ledger)
    assert not ledger.join("de", REMOTE)
    assert claim.refused("pe") == (RefusalReason.MET, False)


def test_a_reader_told_to_stop_is_not_waited_for(open_ledger, claims_on):
    ledger = open_ledger(1)
    claim = claims_on(ledger)
    grant = claim("pe")
    claim.refused("de")
    ledger.fail(grant.claim_id, now_s=0.0)
    assert settled(ledger)


def test_a_reader_told_to_stop_that_asks_again_in_time_helps(open_ledger, claims_on):
    ledger = open_ledger(1)
    claim = claims_on(ledger)
    grant = claim("pe")
    claim.refused("de")
    ledger.fail(grant.claim_id, now_s=0.0)
    claim.landed("de")
    assert ledger.landed_prefix() == 1


def test_without_readers_a_read_has_settled(empty_ledger):
    assert settled(empty_ledger())
