"""What the tests of the ledger share: a reserve of 16 spares (slots 900..916) and ledgers on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sglang_dualpath.ledger import End, Grant, Ledger, Refusal, RefusalReason, Reserve, Share

LOCAL = Share(End.BACK)
REMOTE = Share(End.FRONT, lease_s=1.0, exposed=True)

OpenLedger = Callable[..., Ledger]


def settled(ledger: Ledger) -> bool:
    """Whether all pages have landed, or no more leading ones will."""
    return ledger.settled_through(ledger.end_page - ledger.first_page)


class Claims:
    """Claims at a time of 0 unless told otherwise, and says at once when the answer is of the other kind."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __call__(self, reader: str, max_pages: int | None = None, now_s: float = 0.0) -> Grant:
        answer = self.ledger.claim(reader, max_pages=max_pages, now_s=now_s)
        assert isinstance(answer, Grant), answer
        return answer

    def span(self, reader: str, max_pages: int | None = None, now_s: float = 0.0) -> tuple[int, int]:
        grant = self(reader, max_pages, now_s)
        return grant.first_page, grant.end_page

    def landed(self, reader: str, max_pages: int | None = None, now_s: float = 0.0) -> Grant:
        grant = self(reader, max_pages, now_s)
        self.ledger.land(grant.claim_id, now_s=now_s)
        return grant

    def refused(self, reader: str, now_s: float = 0.0) -> tuple[RefusalReason, bool]:
        answer = self.ledger.claim(reader, max_pages=None, now_s=now_s)
        assert isinstance(answer, Refusal), answer
        return answer.reason, answer.retry


@pytest.fixture
def reserve() -> Reserve:
    return Reserve(range(900, 916))


@pytest.fixture
def empty_ledger(reserve: Reserve) -> OpenLedger:
    """Pages 100.. in slots 0.., all in storage, in chunks of 4 pages. Nobody has joined."""

    def open_it(pages: int = 32, *, in_storage: int | None = None, chunk_pages: int = 4) -> Ledger:
        end = 100 + (pages if in_storage is None else in_storage)
        return Ledger(
            first_page=100, slots=range(pages), storage_end_page=end, reserve=reserve, chunk_pages=chunk_pages
        )

    return open_it


@pytest.fixture
def open_ledger(empty_ledger: OpenLedger) -> OpenLedger:
    """The same, joined by the prefill server's own reader "pe" (back) and a decode reader "de" (front)."""

    def open_it(pages: int = 32, *, local: Share = LOCAL, remote: Share = REMOTE, **options: object) -> Ledger:
        ledger = empty_ledger(pages, **options)
        assert ledger.join("pe", local, local=True)
        assert ledger.join("de", remote)
        return ledger

    return open_it


@pytest.fixture
def ledger(open_ledger: OpenLedger) -> Ledger:
    return open_ledger()


@pytest.fixture
def claim(ledger: Ledger) -> Claims:
    return Claims(ledger)


@pytest.fixture
def claims_on() -> type[Claims]:
    return Claims
