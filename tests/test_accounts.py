"""The end-to-end tests' look at a rank's pages finds what is lost, locked or owned twice, and nothing else."""

from __future__ import annotations

import queue
import threading
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.pool_host.base import HostKVCache
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.tree_core_registry import create_tree_core

from sglang_dualpath.hicache.decode import DualPathDecodeTree
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


class Pool(HostKVCache):
    """SGLang's bookkeeping of host memory, without the memory."""

    def __init__(self) -> None:
        self.page_size, self.size, self.device = 64, 64 * PAGES, "cpu"
        self.lock = threading.RLock()
        self.clear()


Pool.__abstractmethods__ = frozenset()


def sglangs_tree(pool: Any) -> Any:
    """SGLang's own tree over `pool`, with nothing in device memory."""
    tree = object.__new__(DualPathDecodeTree)
    params = CacheInitParams(
        disable=False,
        req_to_token_pool=None,  # type: ignore[arg-type]
        token_to_kv_pool_allocator=None,  # type: ignore[arg-type]
        page_size=pool.page_size,
        tree_components=(ComponentType.FULL,),
    )
    tree.disable, tree.host_memory_mode, tree.metrics_collector = False, "cache", None
    tree.tree_core = create_tree_core("rust", params, {})
    tree.tree_core.set_hicache_enabled()
    tree.tree_components = params.tree_components
    tree.components = {
        ComponentType.FULL: SimpleNamespace(free_host_values=lambda values: [pool.free(value) for value in values])
    }
    tree.cache_controller = SimpleNamespace(
        storage_host_pool=pool,
        prefetch_tokens_occupied=0,
        host_mem_release_queue=queue.Queue(),
        write_policy="write_through",
    )
    tree.token_to_kv_pool_allocator = SimpleNamespace(size=64, available_size=lambda: 64)
    tree.ongoing_prefetch = tree.ongoing_write_through = tree.ongoing_load_back = tree.ongoing_backup = {}
    return tree


def insert(tree: Any, pool: Any, pages: int) -> int:
    """A prompt of so many pages of host memory; its node."""
    key = RadixKey(array("q", range(pages * pool.page_size)), None)
    hashes = [f"{page:064x}" for page in range(pages)]
    core = tree.tree_core
    node: int = core.insert_host(core.root_node_handle(), key, pool.alloc(len(key)), hashes).inserted_host_node
    return node


def test_a_lock_that_is_forgotten_in_sglangs_tree_is_seen() -> None:
    pool = Pool()
    tree = sglangs_tree(pool)
    lock = tree.lock_host(insert(tree, pool, 3))
    assert problems_of(tree) == ["3 host pages are lost or locked: [0, 1, 2]"]
    tree.unlock_host(lock)
    assert problems_of(tree) == []


def test_a_page_that_sglangs_pool_never_got_back_is_seen() -> None:
    pool = Pool()
    tree = sglangs_tree(pool)
    insert(tree, pool, 3)
    pool.alloc(pool.page_size)
    assert problems_of(tree) == ["1 host pages are lost or locked: [3]"]
