"""The prefill engine's path: where a read begins, and that an operation that ended is not opened."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_dualpath.hicache.prefill import DualPathPrefillTree, PrefillPath
from sglang_dualpath.ledger import Reserve
from sglang_dualpath.reader.prefill import PrefillReads
from tests.hicache.decode_side import Operation, hashes
from tests.reader.cluster import CONFIG
from tests.reader.host import PAGE_TOKENS, Slots

HANDLE = "request"


class PrefillNode:
    def __init__(self) -> None:
        self.pool = Slots(32)
        self.reads = PrefillReads(config=CONFIG, pages=self.pool.pages, reserve=Reserve(self.pool.alloc(4)))
        controller: Any = SimpleNamespace(storage_stop_event=threading.Event(), read_pages=lambda *args: 0)
        self.path = PrefillPath(controller, self.reads)

    def operation(self, first: int, end: int) -> Operation:
        """A prefetch of these pages, as SGLang has submitted it and given it host pages."""
        self.path.starting(HANDLE, first * PAGE_TOKENS)
        indices = self.pool.pages.indices(self.pool.alloc(end - first))
        return Operation(HANDLE, first * PAGE_TOKENS, hashes(first, end), indices)


def test_a_read_begins_where_its_operation_does() -> None:
    node = PrefillNode()
    operation = node.operation(2, 6)
    # The request asked again meanwhile, and more of its prompt was matched by then.
    node.path.starting(HANDLE, 5 * PAGE_TOKENS)
    prefetch = node.path.allocated(operation)
    assert (prefetch.first_page, prefetch.end_page) == (2, 6), "a decode engine would push other pages into these slots"
    assert node.path.allocated(operation) is prefetch


def test_a_request_that_asks_again_while_its_prefetch_goes_on_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    node = PrefillNode()
    operation: Any = node.operation(2, 3)
    tree: Any = object.__new__(DualPathPrefillTree)
    tree._dualpath, tree.ongoing_prefetch = node.path, {HANDLE: operation}
    monkeypatch.setattr(UnifiedRadixCache, "prefetch_from_storage", lambda *args, **kwargs: None)
    tree.prefetch_from_storage(HANDLE, None, [0] * 20, matched_prefix_tokens=[0] * (5 * PAGE_TOKENS))
    monkeypatch.setattr(node.reads, "held_pages", lambda handle, reached, possible: 6)
    assert node.path.extend_hit(HANDLE, hashes(2, 8), stored=1) == 4


def test_a_hit_that_goes_on_in_the_memory_of_a_decode_engine_is_in_storage_as_far_as_that_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = PrefillNode()
    operation = node.operation(2, 6)
    monkeypatch.setattr(node.reads, "held_pages", lambda handle, reached, possible: 6)
    assert node.path.extend_hit(HANDLE, hashes(2, 8), stored=1) == 4
    prefetch = node.path.allocated(operation)
    assert (prefetch.pages, prefetch.stored_pages) == (4, 1)
    node.path.transfer_over(operation)
    # The next prefetch of this request finds all in storage.
    assert node.path.allocated(node.operation(0, 3)).stored_pages == 3


def test_an_operation_that_ended_before_it_was_asked_for_is_not_opened_any_more() -> None:
    node = PrefillNode()
    operation = node.operation(0, 4)
    node.path.transfer_over(operation)
    node.path.allocated(operation)
    assert not node.reads.reads
    assert node.path.page_get(operation, hashes(0, 4)) == 0
