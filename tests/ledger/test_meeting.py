"""Readers of different speed on one read: each page is read once, and the faster reader reads more."""

from __future__ import annotations

import heapq
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dualpath.ledger import End, Grant, Ledger, Reserve, Share

from .conftest import settled

FRONT = Share(End.FRONT, lease_s=1e9, exposed=True)
BACK = Share(End.BACK, lease_s=1e9, exposed=True)


def read(
    pages: int, chunk_pages: int, shares: dict[str, tuple[Share, float]]
) -> tuple[Counter[int], Counter[str], float]:
    """Lets readers (share, pages per second) drain a read: reads by page, pages by reader, and the time it took."""
    ledger = Ledger(
        first_page=0,
        slots=range(pages),
        storage_end_page=pages,
        reserve=Reserve(range(pages, 2 * pages)),
        chunk_pages=chunk_pages,
    )
    for name, (share, _) in shares.items():
        ledger.join(name, share, local=not share.exposed)
    reads: Counter[int] = Counter()
    busy: list[tuple[float, int, str, Grant | None]] = [(0.0, -i, name, None) for i, name in enumerate(shares)]
    heapq.heapify(busy)
    now_s = 0.0
    while busy:
        now_s, _, name, grant = heapq.heappop(busy)
        if grant is not None:
            ledger.land(grant.claim_id, now_s=now_s)
        answer = ledger.claim(name, max_pages=None, now_s=now_s)
        if isinstance(answer, Grant):
            reads.update(range(answer.first_page, answer.end_page))
            heapq.heappush(busy, (now_s + answer.pages / shares[name][1], answer.claim_id, name, answer))
    assert settled(ledger)
    assert ledger.landed_prefix() == pages
    return reads, Counter(ledger.statistics().landed_by_reader), now_s


@given(
    pages=st.integers(1, 300),
    chunk_pages=st.integers(1, 32),
    speeds=st.lists(st.floats(1.0, 100.0), min_size=1, max_size=6),
)
def test_any_number_of_readers_reads_every_page_once(pages, chunk_pages, speeds):
    shares = {f"r{i}": (FRONT if i % 2 else BACK, speed) for i, speed in enumerate(speeds)}
    reads, by_reader, _ = read(pages, chunk_pages, shares)
    assert reads == Counter(range(pages))
    assert by_reader.total() == pages


@pytest.mark.parametrize("ratio", [1.5, 3.0, 10.0])
@pytest.mark.parametrize("faster", ["front", "back"])
def test_the_faster_reader_reads_more_in_proportion(ratio, faster):
    speed = {"front": 100.0, "back": 100.0, faster: 100.0 * ratio}
    _, by_reader, _ = read(1000, 16, {"front": (FRONT, speed["front"]), "back": (BACK, speed["back"])})
    slower = "back" if faster == "front" else "front"
    assert by_reader[faster] / by_reader[slower] == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize("speeds", [(100.0, 100.0), (100.0, 37.0), (100.0, 50.0, 200.0), (10.0, 20.0, 30.0, 40.0)])
def test_readers_finish_as_soon_as_their_speeds_add_up(speeds):
    shares = {f"r{i}": (FRONT if i % 2 else BACK, speed) for i, speed in enumerate(speeds)}
    _, _, took_s = read(1000, 32, shares)
    assert took_s <= 1000 / sum(speeds) + 2 / min(speeds)


def test_a_reader_a_hundred_times_slower_holds_the_read_up_by_less_than_a_chunk():
    _, _, took_s = read(1000, 16, {"front": (FRONT, 1000.0), "back": (BACK, 10.0)})
    assert took_s <= 1000 / 1010 + 16 / 10


def test_the_front_readers_pages_and_the_back_readers_pages_are_two_runs():
    ledger = Ledger(first_page=0, slots=range(90), storage_end_page=90, reserve=Reserve(range(100, 200)), chunk_pages=8)
    ledger.join("front", FRONT)
    ledger.join("back", Share(End.BACK), local=True)
    pages: dict[str, list[int]] = {"front": [], "back": []}
    for name in ("front", "back", "front") * 20:
        grant = ledger.claim(name, max_pages=None, now_s=0.0)
        if isinstance(grant, Grant):
            pages[name] += range(grant.first_page, grant.end_page)
    meeting = len(pages["front"])
    assert sorted(pages["front"]) == list(range(meeting))
    assert sorted(pages["back"]) == list(range(meeting, 90))
