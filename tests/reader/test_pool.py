"""Host pools as numbered pages, and the plans of pushes between two of them."""

from __future__ import annotations

import pytest
import torch

from sglang_dualpath.errors import UnsupportedError
from sglang_dualpath.reader.pool import HostPages
from sglang_dualpath.reader.prefetch import Prefetch, Rate, ReadLimit
from tests.reader.host import PAGE_TOKENS, PLANE_BYTES, Slots


def test_planes_are_measured() -> None:
    pool = Slots(5)
    assert [plane.page_bytes for plane in pool.pages.planes] == list(PLANE_BYTES)
    assert [plane.base for plane in pool.pages.planes] == [plane.data_ptr() for plane in pool.planes]
    assert pool.pages.page_bytes == sum(PLANE_BYTES)
    assert pool.pages.slots == 5


def test_regions_cover_every_page_once() -> None:
    pool = Slots(5)
    assert sorted(pool.pages.geometry.regions()) == sorted((plane.data_ptr(), plane.numel()) for plane in pool.planes)


class Pieces:
    """A pool that answers with given addresses for its first, second and last page."""

    def __init__(self, slots: int, addresses: list[int], sizes: list[int]) -> None:
        self.size = slots * PAGE_TOKENS
        self.answer = addresses, sizes

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        return self.answer


@pytest.mark.parametrize(
    ("slots", "addresses", "sizes", "says"),
    [
        (1, [100], [10], "1 page"),
        (4, [100, 110, 999], [10] * 3, "regular"),
        (4, [100, 105, 115], [10] * 3, "regular"),
        (4, list(range(27)), [1] * 27, "9 pieces"),
    ],
)
def test_pools_that_cannot_be_served_are_refused(slots: int, addresses: list[int], sizes: list[int], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        HostPages(Pieces(slots, addresses, sizes), PAGE_TOKENS)


def test_indices_and_slots_are_inverse() -> None:
    pages = Slots(9).pages
    assert pages.slots_of(pages.indices([7, 0, 3])) == [7, 0, 3]
    assert pages.indices([2]).tolist() == [8, 9, 10, 11]


def test_pages_move_to_other_slots_in_place() -> None:
    pages = Slots(20).pages
    indices = pages.indices([3, 4, 5, 6])
    prefetch = Prefetch("handle", 10, 4, list("abcd"), indices, lambda first, slots: 0, lambda: False)
    prefetch.move(pages, 11, [17, 18])
    assert pages.slots_of(indices) == [3, 17, 18, 6]


def test_a_rate_follows_and_knows_nothing_at_first() -> None:
    rate = Rate()
    assert rate.bytes_per_s is None
    for _ in range(10):
        rate.add(100, 1.0)
    assert rate.bytes_per_s == pytest.approx(100)
    for _ in range(200):
        rate.add(300, 1.0)
    assert rate.bytes_per_s == pytest.approx(300, rel=0.01)


def test_readers_side_by_side_have_the_rate_of_their_nic() -> None:
    """Two threads, each busy all the time with reads of 2 s, one second apart: one read ends each second."""
    rate = Rate()
    for end in range(2, 200):
        rate.add(100, 2.0, ended_s=float(end))
    assert rate.bytes_per_s == pytest.approx(100, rel=0.01)
    pause = Rate()
    for end in range(2, 200, 4):  # one reader, idle for half of the time: what it does not read does not count
        pause.add(100, 2.0, ended_s=float(end))
    assert pause.bytes_per_s == pytest.approx(50)


def test_a_read_limit_spaces_reads() -> None:
    now = 0.0
    limit = ReadLimit(100.0, clock=lambda: now)
    assert limit.delay_s() == 0.0
    limit.spend(50)
    assert limit.delay_s() == 0.5
    limit.spend(50)
    assert limit.delay_s() == 1.0
    now = 0.75
    assert limit.delay_s() == 0.25
    now = 10.0
    assert limit.delay_s() == 0.0
    limit.spend(50)
    assert limit.delay_s() == 0.5, "time without reads is saved up"


def test_without_a_read_limit_nothing_waits() -> None:
    limit = ReadLimit(0, clock=lambda: 0.0)
    limit.spend(10**9)
    assert limit.delay_s() == 0.0
