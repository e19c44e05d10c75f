"""Pages that a reader holds in its own memory."""

from __future__ import annotations

import pytest

from sglang_dualpath.ledger import End, RefusalReason, Share, Source

from .conftest import REMOTE, settled

HELPER = Share(End.BACK, lease_s=1.0, exposed=True)


def test_a_reader_takes_from_memory_first(ledger, claim):
    ledger.reserve_range("de", 110, 116, until_s=1.0)
    grants = [claim("de"), claim("de"), claim("de")]
    assert [grant.source for grant in grants] == [Source.MEMORY, Source.MEMORY, Source.STORAGE]
    assert [(grant.first_page, grant.end_page) for grant in grants] == [(110, 114), (114, 116), (100, 104)]


def test_a_back_reader_takes_its_memory_from_the_back(ledger, claim):
    ledger.join("helper", HELPER)
    ledger.reserve_range("helper", 110, 116, until_s=1.0)
    assert claim.span("helper") == (112, 116)


def test_memory_grants_do_not_become_smaller(open_ledger, claims_on):
    ledger = open_ledger(8)
    ledger.reserve_range("de", 100, 108, until_s=1.0)
    assert [claims_on(ledger)("de").pages for _ in range(2)] == [4, 4]


def test_memory_pages_are_counted_and_use_up_no_limit(open_ledger, claims_on):
    ledger = open_ledger(remote=Share(End.FRONT, limit_pages=2, lease_s=1.0, exposed=True))
    ledger.reserve_range("de", 100, 104, until_s=1.0)
    claim = claims_on(ledger)
    assert [claim("de").pages, claim("de").pages] == [4, 2]
    assert ledger.statistics().memory_pages == 4


def test_a_limit_of_none_of_storage_still_allows_memory(open_ledger, claims_on):
    ledger = open_ledger(remote=Share(End.FRONT, limit_pages=0, lease_s=1.0, exposed=True))
    ledger.reserve_range("de", 100, 104, until_s=1.0)
    claim = claims_on(ledger)
    claim("de")
    assert claim.refused("de") == (RefusalReason.LIMIT, False)


def test_nobody_else_claims_reserved_pages(open_ledger, claims_on):
    ledger = open_ledger(8)
    ledger.reserve_range("de", 100, 107, until_s=1.0)
    claim = claims_on(ledger)
    assert claim.span("pe") == (107, 108)
    assert claim.refused("pe") == (RefusalReason.RESERVED, True)


def test_a_reservation_ends_in_time(open_ledger, claims_on):
    ledger = open_ledger(8)
    ledger.reserve_range("de", 100, 108, until_s=1.0)
    assert claims_on(ledger).span("pe", now_s=1.0) == (106, 108)


def test_a_reservation_past_its_time_still_says_what_is_in_memory(ledger, claim):
    ledger.reserve_range("de", 100, 104, until_s=1.0)
    assert claim("de", now_s=9.0).source is Source.MEMORY


@pytest.mark.parametrize("lands", [False, True])
def test_grants_and_landings_renew_a_reservation(open_ledger, claims_on, lands):
    ledger = open_ledger(8)
    ledger.reserve_range("de", 100, 108, until_s=1.0)
    claim = claims_on(ledger)
    grant = claim("de", now_s=0.5 if lands else 0.9)
    if lands:
        ledger.land(grant.claim_id, now_s=0.9)
    assert claim.refused("pe", now_s=1.8) == (RefusalReason.RESERVED, True)
    assert claim.span("pe", now_s=1.9) == (107, 108)


def test_a_failure_does_not_renew_a_reservation(open_ledger, claims_on):
    ledger = open_ledger(8)
    ledger.reserve_range("de", 100, 108, until_s=1.0)
    claim = claims_on(ledger)
    ledger.fail(claim("de", now_s=0.0).claim_id, now_s=0.9)
    assert claim("pe", now_s=1.0).end_page == 108


def test_a_reader_that_leaves_gives_up_its_reservation(open_ledger, claims_on):
    ledger = open_ledger(8)
    ledger.reserve_range("de", 100, 108, until_s=1.0)
    ledger.leave("de", now_s=0.0)
    assert claims_on(ledger).span("pe") == (104, 108)


def test_what_failed_from_memory_is_no_longer_reserved(open_ledger, claims_on):
    ledger = open_ledger(4)
    ledger.reserve_range("de", 100, 104, until_s=9.0)
    claim = claims_on(ledger)
    ledger.land(claim("de").claim_id, good_pages=1, now_s=0.0)
    assert claim.span("pe", now_s=0.1) == (101, 104)


def test_reserving_again_does_not_lift_a_bar(ledger, claim):
    ledger.reserve_range("de", 100, 104, until_s=9.0)
    ledger.fail(claim("de").claim_id, now_s=0.0)
    ledger.reserve_range("de", 100, 104, until_s=9.0)
    assert claim.span("de") == (104, 108)


def test_two_readers_that_hold_the_same_pages_do_not_keep_each_other_out(open_ledger, claims_on):
    ledger = open_ledger(8)
    ledger.join("helper", HELPER)
    ledger.reserve_range("de", 100, 108, until_s=1.0)
    ledger.reserve_range("helper", 100, 108, until_s=1.0)
    claim = claims_on(ledger)
    assert (claim.span("de"), claim.span("helper")) == ((100, 104), (104, 108))


def test_pages_beyond_storage_land_from_memory_alone(open_ledger, claims_on):
    ledger = open_ledger(8, in_storage=4)
    ledger.reserve_range("de", 100, 108, until_s=1.0)
    claim = claims_on(ledger)
    claim.landed("de")
    claim.landed("de")
    assert (settled(ledger), ledger.landed_prefix()) == (True, 8)


def test_pages_beyond_storage_are_lost_with_their_holder(open_ledger, claims_on):
    ledger = open_ledger(8, in_storage=2)
    ledger.reserve_range("de", 100, 108, until_s=1.0)
    ledger.leave("de", now_s=0.0)
    claims_on(ledger).landed("pe")
    assert (settled(ledger), ledger.landed_prefix()) == (True, 2)


def test_a_range_is_cut_to_the_read(ledger, claim):
    ledger.reserve_range("de", 0, 102, until_s=1.0)
    assert claim.span("de") == (100, 102)


def test_only_a_reader_that_joined_can_reserve(ledger):
    ledger.leave("de", now_s=0.0)
    assert not ledger.reserve_range("de", 100, 104, until_s=1.0)
    assert not ledger.reserve_range("stranger", 100, 104, until_s=1.0)


def test_the_local_reader_has_no_memory_to_read_from(ledger):
    with pytest.raises(ValueError, match="storage only"):
        ledger.reserve_range("pe", 100, 104, until_s=1.0)


def test_a_reservation_of_a_reader_without_lease_is_not_renewed(open_ledger, claims_on):
    ledger = open_ledger(8, remote=Share(End.FRONT, exposed=True))
    ledger.reserve_range("de", 100, 108, until_s=1.0)
    claim = claims_on(ledger)
    assert claim("de", now_s=0.9).expires_s is None
    assert claim.span("pe", now_s=1.0) == (107, 108)
    assert ledger.join("de", REMOTE)


def test_a_reader_that_comes_back_must_say_again_what_it_holds(ledger, claim):
    ledger.reserve_range("de", 110, 116, until_s=1.0)
    ledger.leave("de", now_s=0.0)
    ledger.join("de", REMOTE)
    assert claim("de").source is Source.STORAGE


def test_pages_to_read_are_in_storage_unclaimed_and_not_held(open_ledger, claims_on):
    ledger = open_ledger(32)
    assert ledger.pages_to_read(None) == ledger.pages_to_read("de") == 32
    ledger.reserve_range("de", 110, 116, until_s=1.0)
    assert [ledger.pages_to_read(reader) for reader in ("de", "nobody", None)] == [26, 32, 32]
    claimed = claims_on(ledger)("pe").pages
    assert claimed
    assert ledger.pages_to_read("de") == 26 - claimed
