"""Hit queries that a read path extends, with and without a store that is told whose they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import STORAGE_BATCH_SIZE, HiCacheStorageExtraInfo
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

from sglang_dualpath.compat import native
from sglang_dualpath.hicache.controller import (
    DualPathCacheController,
    HitQueryingCacheController,
    controller_class,
)

HASHES = ["a", "b", "c", "d"]
PAGE_TOKENS = 4


class Path:
    """Two pages more than storage has, for the request "ours"."""

    def __init__(self, *, waits: bool = False) -> None:
        self._waits = waits

    def extend_hit(self, handle: Any, hashes: list[str], stored: int) -> int:
        return min(len(hashes), stored + 2) if handle == "ours" else stored

    def waits_for_room(self) -> bool:
        return self._waits


class Store:
    """Has the first page of whatever is asked for, and notes which request asked."""

    def __init__(self) -> None:
        self.asked_by: list[Any] = []

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        self.asked_by.append(getattr(extra_info, "handle", None))
        return min(1, len(keys))

    def get(self, operation: Any, keys: list[str], indices: Any, extra_info: Any) -> int:
        del operation, indices
        self.asked_by.append(getattr(extra_info, "handle", None))
        return len(keys)


def attached(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Store]:
    """A controller of the kind that fits the installed SGLang, to which a store was attached, twice."""
    ours, store = controller(controller_class(), Path()), Store()

    def attach(self: Any) -> None:
        self.storage_backend, self.page_get_func, self.page_set_func = store, store.get, None

    monkeypatch.setattr(HybridCacheController, "attach_storage_backend", attach)
    ours.attach_storage_backend()
    vars(store).pop("batch_exists", None)
    ours.attach_storage_backend()
    return ours, store


def operation_of(handle: str, tokens: int) -> Any:
    return SimpleNamespace(
        handle=handle, token_ids=list(range(tokens)), last_hash="", assume_stored=False, prefix_keys=None,
        pool_transfers=None, pool_storage_result=SimpleNamespace(update_kv_hit_pages=lambda pages: None),
        hash_value=HASHES,
    )  # fmt: skip


@pytest.mark.parametrize(("handle", "hits"), [("ours", 3), ("other", 1)])
def test_the_hits_of_a_request_go_on_in_what_a_decode_engine_holds(
    monkeypatch: pytest.MonkeyPatch, handle: str, hits: int
) -> None:
    ours, store = attached(monkeypatch)
    found, tokens = ours._storage_hit_query(operation_of(handle, 4 * PAGE_TOKENS))
    assert (len(found), tokens) == (hits, hits * PAGE_TOKENS)
    assert store.asked_by == [handle if native.has(native.STORAGE_REQUEST_HANDLE) else None]


def test_a_store_that_can_be_told_whose_pages_are_read_is(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, store = attached(monkeypatch)
    assert ours.read_pages(operation_of("ours", 0), 1, torch.arange(2 * PAGE_TOKENS)) == 2
    assert store.asked_by == ["ours" if native.has(native.STORAGE_REQUEST_HANDLE) else None]


def test_a_store_is_asked_for_as_many_pages_at_a_time_as_upstream_asks_for() -> None:
    asked: list[tuple[list[str], list[str]]] = []

    def get(operation: Any, keys: list[str], indices: Any, extra_info: Any) -> int:
        assert len(indices) == len(keys) * PAGE_TOKENS
        asked.append((keys, extra_info.prefix_keys))
        return len(keys) - (keys[-1] == hashes[-1])  # the last page is not there

    hashes = [str(number) for number in range(3 * STORAGE_BATCH_SIZE)]
    ours = controller(DualPathCacheController, Path())
    ours._stock_page_get = get
    operation = SimpleNamespace(handle="ours", hash_value=hashes, prefix_keys=["before"])
    indices = torch.arange((2 * STORAGE_BATCH_SIZE + 5) * PAGE_TOKENS)
    assert ours.read_pages(operation, 10, indices) == 2 * STORAGE_BATCH_SIZE + 5
    assert [len(keys) for keys, _ in asked] == [STORAGE_BATCH_SIZE, STORAGE_BATCH_SIZE, 5]
    assert [keys for keys, _ in asked] == [hashes[10:138], hashes[138:266], hashes[266:271]]
    assert [prefix for _, prefix in asked] == [["before", *hashes[:first]] for first in (10, 138, 266)]
    assert ours.read_pages(operation, 3 * STORAGE_BATCH_SIZE - 2, torch.arange(2 * PAGE_TOKENS)) == 1


@pytest.mark.parametrize("prefix", [None, ["before"]])
def test_pages_are_written_back_in_runs_that_go_on_from_their_prefix(prefix: list[str] | None) -> None:
    written: list[tuple[list[str], list[int], list[str] | None]] = []
    counted: list[int] = []

    def put(keys: list[str], indices: Any, extra_info: Any) -> bool:
        written.append((keys, indices.tolist(), extra_info.prefix_keys))
        return keys != ["d"]

    path: Any = SimpleNamespace(unwritten=lambda hashes, prefix: [0, 1, 3], written_back=counted.append)
    ours = controller(DualPathCacheController, path)
    ours._stock_page_set = put
    about = HiCacheStorageExtraInfo(prefix_keys=prefix, extra_info={"more": 1})
    assert not ours._set_pages(HASHES, torch.arange(4 * PAGE_TOKENS), about)
    tokens = list(range(4 * PAGE_TOKENS))
    assert written == [
        (["a", "b"], tokens[: 2 * PAGE_TOKENS], prefix),
        (["d"], tokens[3 * PAGE_TOKENS :], None if prefix is None else ["before", "a", "b", "c"]),
    ]
    assert counted == [2]
    assert about.prefix_keys == prefix
    path.unwritten = lambda hashes, prefix: []
    assert ours._set_pages(HASHES, torch.arange(4 * PAGE_TOKENS), about)
    assert len(written) == 2


def controller(kind: type, path: Path | None) -> Any:
    made = object.__new__(kind)
    made._dualpath, made.page_size = path, PAGE_TOKENS
    return made


@pytest.mark.parametrize(
    ("handle", "path", "hits"), [("ours", Path(), 3), ("other", Path(), 1), (None, Path(), 1), ("ours", None, 1)]
)
def test_a_store_that_is_told_who_asks_finds_more(handle: str | None, path: Path | None, hits: int) -> None:
    ours = controller(DualPathCacheController, path)
    assert ours._hits(lambda hashes, extra_info: 1, HASHES, SimpleNamespace(handle=handle)) == hits


def test_a_query_about_nobody_s_pages_is_the_store_s() -> None:
    assert controller(DualPathCacheController, Path())._hits(lambda hashes, extra_info: 1, HASHES, None) == 1


@pytest.mark.parametrize(
    ("changes", "hits"),
    [({}, 3), ({"handle": "other"}, 1), ({"assume_stored": True}, 1), ({"pool_transfers": ["more"]}, 1),
     ({"all_hash_values": []}, 1)],
)  # fmt: skip
def test_without_that_the_operation_says_whose_they_are(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], hits: int
) -> None:
    monkeypatch.setattr(HybridCacheController, "_storage_hit_query", lambda self, operation: (HASHES[:1], PAGE_TOKENS))
    operation = SimpleNamespace(handle="ours", all_hash_values=HASHES, assume_stored=False, pool_transfers=None)
    vars(operation).update(changes)
    found = controller(HitQueryingCacheController, Path())._storage_hit_query(operation)
    assert found == (HASHES[:hits], hits * PAGE_TOKENS)


def test_without_a_path_the_hits_are_the_store_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HybridCacheController, "_storage_hit_query", lambda self, operation: (HASHES[:1], PAGE_TOKENS))
    operation = SimpleNamespace(handle="ours", all_hash_values=HASHES, assume_stored=False, pool_transfers=None)
    assert controller(HitQueryingCacheController, None)._storage_hit_query(operation) == (HASHES[:1], PAGE_TOKENS)


def prefetching(monkeypatch: pytest.MonkeyPatch, path: Path | None, *, available: int) -> Any:
    """A controller with so much room in its host pool, and room for 10 tokens in the fullest of the model's pools."""
    ours = controller(DualPathCacheController, path)
    pool = SimpleNamespace(available_size=lambda: available, anchor_entry=SimpleNamespace(host_pool=None))
    monkeypatch.setattr(ours, "mem_pool_host", pool, raising=False)
    monkeypatch.setattr(
        ours, "alloc_prefetch_host_buffers", lambda operation, tokens: torch.arange(tokens) if tokens <= 10 else None
    )
    return ours


@pytest.mark.parametrize(("path", "got"), [(None, 8), (Path(), 8), (Path(waits=True), None)])
def test_a_prefetch_gets_a_part_of_its_host_pages_unless_its_path_waits_for_all(
    monkeypatch: pytest.MonkeyPatch, path: Path | None, got: int | None
) -> None:
    ours = prefetching(monkeypatch, path, available=10)
    pages, _ = ours.allocate_storage_hit(
        operation_of("ours", 16), 16, allow_partial=True, min_tokens=PAGE_TOKENS, evict_host=lambda tokens: 0
    )
    assert (None if pages is None else len(pages)) == got


@pytest.mark.parametrize(
    ("path", "available", "asked"),
    [
        (None, 10, 16),
        (Path(), 10, 16),
        (Path(waits=True), 10, 6),
        (Path(waits=True), 0, 16),
        (Path(waits=True), 16, 16),  # another of the model's pools is full
    ],
)
def test_a_prefetch_that_waits_for_room_evicts_no_more_than_it_misses(
    monkeypatch: pytest.MonkeyPatch, path: Path | None, available: int, asked: int
) -> None:
    ours = prefetching(monkeypatch, path, available=available)
    evicted: list[int] = []
    ours.allocate_storage_hit(
        operation_of("ours", 16), 16, allow_partial=True, min_tokens=PAGE_TOKENS, evict_host=evicted.append
    )
    assert evicted == [asked]
