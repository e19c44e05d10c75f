"""Hit queries that a read path extends, with and without a store that is told whose they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

from sglang_dualpath.hicache.controller import DualPathCacheController, HitQueryingCacheController

HASHES = ["a", "b", "c", "d"]
PAGE_TOKENS = 4


class Path:
    """Two pages more than storage has, for the request "ours"."""

    def extend_hit(self, handle: Any, hashes: list[str], stored: int) -> int:
        return min(len(hashes), stored + 2) if handle == "ours" else stored


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
