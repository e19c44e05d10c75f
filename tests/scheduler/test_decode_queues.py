"""A restore that found no device memory: tried again, and given up, in the same iteration on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation.decode import DecodeTransferQueue
from sglang.srt.disaggregation.decode_hicache_mixin import HiCacheRestoreResult

from sglang_dualpath.scheduler import decode_queues
from sglang_dualpath.scheduler.decode_queues import DualPathDecodeTransferQueue


class Queue:
    """The queue, a request whose restore finds no memory, and another rank that says what a test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.others_say = True
        self.tries = 0
        manager = SimpleNamespace(waiting_timeout=5.0)
        self.request: Any = SimpleNamespace(
            req=SimpleNamespace(rid="r"), kv_receiver=SimpleNamespace(kv_mgr=manager), prefix_match=None,
            hicache_restore_status=HiCacheRestoreResult.PENDING,
        )  # fmt: skip
        queue: Any = object.__new__(DualPathDecodeTransferQueue)
        queue.tree_cache = SimpleNamespace(ranks=SimpleNamespace(least=self._least))
        self._queue = queue
        monkeypatch.setattr(decode_queues, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(
            DecodeTransferQueue, "_try_hicache_queue_load_back", lambda _, request: self._fall_short(request)
        )

    def _least(self, values: Sequence[int]) -> list[int]:
        return [int(value and self.others_say) for value in values]

    def _fall_short(self, request: Any) -> bool:
        self.tries += 1
        request.hicache_restore_status = HiCacheRestoreResult.FAILED
        return False

    def turn(self) -> HiCacheRestoreResult:
        assert self._queue._try_hicache_queue_load_back(self.request) is False
        status: HiCacheRestoreResult = self.request.hicache_restore_status
        return status


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    return Queue(monkeypatch)


def test_it_is_tried_again_after_a_while(queue: Queue) -> None:
    assert queue.turn() is HiCacheRestoreResult.PENDING
    queue.turn()
    assert queue.tries == 1
    queue.now_s += 0.1
    assert queue.turn() is HiCacheRestoreResult.PENDING
    assert queue.tries == 2


def test_it_is_not_tried_again_before_the_other_ranks_do(queue: Queue) -> None:
    queue.turn()
    queue.now_s += 0.1
    queue.others_say = False
    queue.turn()
    assert queue.tries == 1


def test_it_fails_when_the_patience_of_any_rank_ends(queue: Queue) -> None:
    queue.turn()
    queue.now_s += 0.1
    queue.turn()
    queue.now_s += 5.0
    assert queue.turn() is HiCacheRestoreResult.FAILED


def test_it_fails_with_the_other_ranks_though_this_one_would_wait(queue: Queue) -> None:
    queue.others_say = False  # about patience: this is the first try, which no rank was asked about
    assert queue.turn() is HiCacheRestoreResult.FAILED
