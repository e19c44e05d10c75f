"""Claims that are taken away from their readers: by lease, by suspicion, at the end."""

from __future__ import annotations

from sglang_dualpath.ledger import End, RefusalReason, Share, Source, Swap

from .conftest import REMOTE, settled


def test_nothing_expires_within_its_lease(ledger, claim):
    claim("de")
    assert ledger.expire(now_s=0.99) == []


def test_a_local_claim_never_expires(ledger, claim):
    claim("pe")
    assert ledger.expire(now_s=1e9) == []


def test_an_expired_claim_is_swapped_into_spares(ledger, claim, reserve):
    grant = claim("de")
    [expired] = ledger.expire(now_s=1.0)
    assert expired.grant == grant
    assert expired.swap == Swap(100, (0, 1, 2, 3), (900, 901, 902, 903))
    assert ledger.slots[:5] == (900, 901, 902, 903, 4)
    assert reserve.exposed_slots() == {0, 1, 2, 3}


def test_a_lease_that_ends_at_time_zero_ends(ledger, claim):
    claim("de", now_s=-1.0)
    assert len(ledger.expire(now_s=0.0)) == 1


def test_the_pages_of_an_expired_claim_are_claimed_by_another_into_the_spares(open_ledger, claims_on):
    ledger = open_ledger(4)
    claim = claims_on(ledger)
    claim("de", 1)
    ledger.expire(now_s=1.0)
    grants = [claim("pe") for _ in range(1)]
    assert grants[-1].slots == (900, 1, 2, 3)


def test_a_reader_whose_lease_ran_out_gets_nothing_until_its_last_word(ledger, claim):
    grant = claim("de")
    ledger.expire(now_s=1.0)
    assert claim.refused("de") == (RefusalReason.LATE, True)
    assert not ledger.counts_on("de")
    ledger.settle_late(grant.claim_id)
    assert claim.span("de") == (104, 108)
    assert ledger.counts_on("de")


def test_a_reader_that_lost_two_claims_owes_two_words(ledger, claim):
    grants = [claim("de"), claim("de")]
    ledger.expire(now_s=1.0)
    ledger.settle_late(grants[1].claim_id)
    assert claim.refused("de") == (RefusalReason.LATE, True)
    ledger.settle_late(grants[0].claim_id)
    assert claim.span("de") == (108, 112)


def test_others_take_everything_while_a_reader_is_suspended(open_ledger, claims_on):
    ledger = open_ledger(8, local=Share(End.BACK, limit_pages=0))
    claim = claims_on(ledger)
    claim("de", 2)
    assert claim.refused("pe")[0] is RefusalReason.LIMIT
    ledger.expire(now_s=1.0)
    assert [claim.span("pe"), claim.span("pe")] == [(104, 108), (100, 104)]


def test_a_reader_that_lost_a_claim_from_memory_still_holds_the_rest(ledger, claim):
    ledger.reserve_range("de", 100, 110, until_s=1.0)
    grant = claim("de")
    assert grant.source is Source.MEMORY
    ledger.expire(now_s=1.0)
    ledger.settle_late(grant.claim_id)
    back = claim("de", now_s=1.0)
    assert (back.source, back.first_page, back.end_page) == (Source.MEMORY, 104, 108)


def test_a_reader_that_loses_its_lease_a_fourth_time_stays_away(ledger, claim):
    for _ in range(3):
        grant = claim("de", 1)
        ledger.expire(now_s=1.0)
        ledger.settle_late(grant.claim_id)
    grant = claim("de", 1)
    ledger.expire(now_s=1.0)
    ledger.settle_late(grant.claim_id)
    assert claim.refused("de") == (RefusalReason.UNKNOWN_READER, False)


def test_a_reader_that_left_does_not_come_back_by_a_lost_lease(ledger, claim):
    grant = claim("de")
    ledger.leave("de", now_s=0.5)
    ledger.expire(now_s=1.0)
    ledger.settle_late(grant.claim_id)
    assert claim.refused("de") == (RefusalReason.UNKNOWN_READER, False)


def test_a_suspended_reader_that_leaves_stays_away(ledger, claim):
    grant = claim("de")
    ledger.expire(now_s=1.0)
    ledger.leave("de", now_s=1.0)
    ledger.settle_late(grant.claim_id)
    assert claim.refused("de") == (RefusalReason.UNKNOWN_READER, False)


def test_a_reader_back_from_an_expired_lease_is_barred_from_its_pages(ledger, claim):
    claim("de")
    ledger.expire(now_s=1.0)
    ledger.join("de", REMOTE)
    assert claim.span("de") == (104, 108)


def test_other_claims_of_a_reader_keep_their_own_lease(ledger, claim):
    claim("de")
    second = claim("de", now_s=0.5)
    ledger.expire(now_s=1.0)
    assert ledger.land(second.claim_id, now_s=1.2).pages == 4


def test_a_word_after_expiry_is_late_and_names_the_claim(ledger, claim):
    grant = claim("de")
    ledger.expire(now_s=1.0)
    landed = ledger.land(grant.claim_id, now_s=2.0)
    assert (landed.late, landed.grant, landed.pages) == (True, grant, 0)
    assert ledger.landed_prefix() == 0


def test_a_late_word_settles_and_the_old_slots_become_spares(ledger, claim, reserve):
    grant = claim("de")
    ledger.expire(now_s=1.0)
    assert ledger.settle_late(grant.claim_id) == 4
    assert (reserve.free, reserve.quarantined) == (16, 0)
    assert reserve.back(16)
    assert set(reserve.swap(range(1000, 1016), "other")) >= {0, 1, 2, 3}


def test_settling_twice_releases_once(ledger, claim):
    grant = claim("de")
    ledger.expire(now_s=1.0)
    assert (ledger.settle_late(grant.claim_id), ledger.settle_late(grant.claim_id)) == (4, 0)


def test_word_in_the_last_moment_before_expiry_is_found_counts(ledger, claim):
    grant = claim("de")
    assert ledger.land(grant.claim_id, now_s=7.0).pages == 4
    assert ledger.expire(now_s=7.0) == []


def test_revoking_a_reader_takes_all_its_claims_and_no_others(ledger, claim):
    claims = [claim("de"), claim("de")]
    claim("pe")
    assert [expired.grant for expired in ledger.revoke("de", now_s=0.0)] == claims
    assert [grant.reader for grant in ledger.open_grants()] == ["pe"]
    assert claim.refused("de") == (RefusalReason.UNKNOWN_READER, False)


def test_revoking_a_stranger_takes_nothing(ledger, claim):
    claim("de")
    assert ledger.revoke("stranger", now_s=0.0) == []


def test_closing_takes_every_exposed_claim_away(ledger, claim, reserve):
    claims = [claim("de"), claim("de")]
    assert [expired.grant for expired in ledger.close(now_s=0.0)] == claims
    assert reserve.exposed_slots().isdisjoint(ledger.slots)


def test_closing_twice_does_nothing_more(ledger, claim):
    claim("de")
    ledger.close(now_s=0.0)
    assert ledger.close(now_s=0.0) == []


def test_a_closed_ledger_grants_nothing_and_admits_nobody(ledger, claim):
    ledger.close(now_s=0.0)
    assert claim.refused("pe") == (RefusalReason.CLOSED, False)
    assert not ledger.join("late", REMOTE)


def test_a_closed_ledger_has_settled_with_what_had_landed(ledger, claim):
    claim.landed("de")
    claim("de")
    ledger.close(now_s=0.0)
    assert (settled(ledger), ledger.landed_prefix()) == (True, 4)


def test_local_claims_are_waited_for_after_closing(ledger, claim):
    grant = claim("pe")
    ledger.close(now_s=0.0)
    assert ledger.open_local_claims() == 1
    assert ledger.land(grant.claim_id, now_s=0.0).pages == 0
    assert ledger.open_local_claims() == 0


def test_statistics_tell_reclaimed_from_abandoned_pages(ledger, claim):
    claim("de")
    ledger.expire(now_s=1.0)
    ledger.join("de", REMOTE)
    claim("de", 3, now_s=1.0)
    ledger.close(now_s=1.0)
    stats = ledger.statistics()
    assert (stats.reclaimed_pages, stats.abandoned_pages, stats.swapped_pages) == (4, 3, 7)


def test_revoking_a_reader_without_claims_makes_it_leave(ledger, claim):
    assert ledger.revoke("de", now_s=0.0) == []
    assert claim.refused("de") == (RefusalReason.UNKNOWN_READER, False)
