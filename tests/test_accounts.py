"""The end-to-end tests' look at a rank's pages finds what is lost, locked or owned twice, and nothing else."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dualpath.ledger import Reserve
from tests.e2e.accounts import problems_of

PAGE_TOKENS = 4
PAGES = 32


class Tree:
    """As much as is looked at of an idle engine's tree: pages in host memory, some of them locked, and a reserve."""

    def __init__(self, cached: Sequence[int], reserve: Sequence[int] = (), locked: Sequence[int] = ()) -> None:
        self.cached = {*cached}
        self.locked = {*locked}
        self.pool = SimpleNamespace(
            size=PAGES * PAGE_TOKENS, page_size=PAGE_TOKENS, slot_used=torch.zeros(PAGES * PAGE_TOKENS).bool()
        )
        self.use((*cached, *reserve))
        self.token_to_kv_pool_allocator = SimpleNamespace(size=64, available_size=lambda: 64 - self.device_tokens)
        self.device_tokens = 0
        self.cache_controller: Any = SimpleNamespace(
            storage_host_pool=self.pool, prefetch_tokens_occupied=0, host_mem_release_queue=queue.Queue()
        )
        self._reserve = SimpleNamespace(reserve=Reserve(reserve), _lock=threading.Condition())
        self.reserve = self._reserve.reserve
        self.ongoing_prefetch: dict[str, object] = {}
        self.ongoing_write_through = self.ongoing_load_back = self.ongoing_backup = {}

    def use(self, pages: Sequence[int], *, used: bool = True) -> None:
        for page in pages:
            self.pool.slot_used[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS] = used

    def _evict(self, params: Any) -> None:
        pass

    def evict_host(self, num_tokens: int) -> None:
        self.use([*(self.cached - self.locked)], used=False)


def test_cache_and_reserve_are_accounted_for() -> None:
    assert problems_of(Tree(cached=range(10), reserve=range(10, 14))) == []


def test_slots_in_quarantine_are_accounted_for() -> None:
    tree = Tree(cached=range(10), reserve=range(10, 14))
    tree.reserve.back(2)
    tree.cached = {*range(2, 10), *tree.reserve.swap([0, 1], "claim")}
    assert problems_of(tree) == []


def test_a_swap_that_the_tree_does_not_follow_is_seen() -> None:
    tree = Tree(cached=range(10), reserve=range(10, 14))
    tree.reserve.back(2)
    tree.reserve.swap([0, 1], "claim")
    lost, shared = problems_of(tree)
    assert lost == "2 host pages are lost or locked: [10, 11]"
    assert shared == "2 host pages of the reserve are in the pool, too: [0, 1]"


@pytest.mark.parametrize("locked", [[7], [3, 7]])
def test_locked_pages_are_seen(locked: list[int]) -> None:
    (problem,) = problems_of(Tree(cached=range(10), locked=locked))
    assert problem == f"{len(locked)} host pages are lost or locked: {locked}"


def test_pages_that_nobody_has_are_seen() -> None:
    tree = Tree(cached=range(10))
    tree.use([20])
    assert problems_of(tree) == ["1 host pages are lost or locked: [20]"]


def test_device_tokens_and_occupied_prefetches_are_seen() -> None:
    tree = Tree(cached=range(10))
    tree.device_tokens = 8
    tree.cache_controller.prefetch_tokens_occupied = 256
    assert problems_of(tree) == ["256 tokens occupied by prefetches", "8 device tokens are lost or locked"]


def test_nothing_is_given_up_while_something_is_in_flight() -> None:
    tree = Tree(cached=range(10))
    tree.ongoing_prefetch["request"] = object()
    assert problems_of(tree) == ["1 prefetches in flight"]
    assert tree.pool.slot_used.any()
