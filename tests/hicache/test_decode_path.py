"""The decode engine's path between SGLang's HiCache and its reads: who opens a prefetch, and what locks are left."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dualpath import metrics
from sglang_dualpath.hicache.decode import DecodePath
from sglang_dualpath.protocol import Decline
from sglang_dualpath.reader.decode import Phase
from sglang_dualpath.reader.prefetch import Prefetch
from tests.hicache.decode_side import DecodeNode, Operation, hashes

ROOM = 1


def read_two_pages(node: DecodeNode) -> None:
    """A request whose read brought two pages, is over and forgotten. It was not admitted yet."""
    node.accept(ROOM)
    operation = node.offer(ROOM)
    node.path.allocated(operation)
    node.serve(ROOM, 0, 2)
    assert node.path.page_get(operation, hashes(0, 8)) == 2
    node.end_transfer(operation, got=2)
    assert not node.reads.pending(ROOM)
    node.path.tick()
    assert not node.reads.reads
    assert node.tree.locked == 1, "what was read is not held for the request's restore"


# -- who opens a prefetch ----------------------------------------------------------------------------------------------


def test_an_operation_that_ended_before_it_was_asked_for_is_not_opened_any_more() -> None:
    node = DecodeNode()
    read = node.accept(ROOM)
    operation = node.offer(ROOM)
    # SGLang's IO thread skips what was terminated meanwhile, and is faster than the scheduler's tick.
    node.path.transfer_over(operation)
    node.path.allocated(operation)
    assert read.prefetch is None
    assert not node.claims, "pages were claimed for host memory that is not the operation's any more"
    assert node.path.page_get(operation, hashes(0, 8)) == 0


def test_an_operation_of_an_unknown_request_ends_without_a_read() -> None:
    node = DecodeNode()
    operation = Operation("stranger", 0, hashes(0, 2), node.pool.pages.indices([1, 2]))
    node.path.allocated(operation)
    assert node.path.page_get(operation, hashes(0, 2)) == 0
    node.path.transfer_over(operation)
    assert not node.reads._by_prefetch


def test_the_io_thread_opens_what_the_scheduler_has_not_opened_yet() -> None:
    node = DecodeNode()
    read = node.accept(ROOM)
    operation = node.offer(ROOM)
    got: list[int] = []
    waiting = threading.Thread(target=lambda: got.append(node.path.page_get(operation, hashes(0, 8))))
    waiting.start()
    deadline_s = time.monotonic() + 10
    while not node.claims and time.monotonic() < deadline_s:
        time.sleep(0.001)
    assert read.phase is Phase.READING
    node.serve(ROOM, 0, 3)
    waiting.join(10)
    assert got == [3]


def test_the_scheduler_opens_an_operation_for_the_io_thread_to_find() -> None:
    node = DecodeNode()
    read = node.accept(ROOM)
    operation = node.offer(ROOM)
    node.path.allocated(operation)
    assert node.claims, "nothing is read ahead"
    opened = read.prefetch
    node.serve(ROOM, 0, 3)
    assert node.path.page_get(operation, hashes(0, 2)) == 2
    assert node.path.page_get(operation, hashes(2, 8)) == 1
    assert read.prefetch is opened
    assert opened is not None
    assert opened.cursor == 8


def test_two_threads_that_open_an_operation_at_once_open_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    node = DecodeNode()
    read = node.accept(ROOM)
    operation = node.offer(ROOM)
    made: list[Prefetch] = []
    make = DecodePath._prefetch

    def slowly(path: DecodePath, of: Operation) -> Prefetch:
        time.sleep(0.1)  # the other thread comes in between
        made.append(make(path, of))
        return made[-1]

    monkeypatch.setattr(DecodePath, "_prefetch", slowly)
    threads = [threading.Thread(target=node.path.allocated, args=(operation,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert made == [read.prefetch]


def test_a_prefetch_that_raises_lets_the_request_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    node = DecodeNode()
    node.accept(ROOM)

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("prefetch anchor namespace")

    monkeypatch.setattr(node.tree, "prefetch_from_storage", fail)
    counted = metrics.FALLBACKS.value(reason="prefetch_exception")
    node.make_offer(ROOM)
    node.path.tick()
    assert not node.reads.pending(ROOM)
    assert [message.reason for message in node.said if isinstance(message, Decline)] == ["prefetch_exception"]
    assert metrics.FALLBACKS.value(reason="prefetch_exception") == counted + 1
    node.path.tick()
    assert not node.reads.reads


# -- locks -------------------------------------------------------------------------------------------------------------


def test_a_request_that_leaves_after_its_read_was_forgotten_releases_what_was_kept() -> None:
    node = DecodeNode()
    read_two_pages(node)
    node.leave(ROOM)
    assert node.tree.locked == 0


def test_a_request_that_was_admitted_has_a_lock_of_its_own() -> None:
    node = DecodeNode()
    read_two_pages(node)
    node.path.release_kept("request")
    assert node.tree.locked == 0
    node.leave(ROOM)  # when its transfer is complete
    assert node.tree.locked == 0


@pytest.mark.parametrize("held_pages", [0, 3])
def test_a_match_that_ends_in_device_memory_alone_locks_what_is_in_host_memory(held_pages: int) -> None:
    """SGLang's host lock of such a node holds nothing and cannot be released once the node is evicted."""
    node = DecodeNode(host_pages=held_pages)
    node.tree.device_tail = True
    node.accept(ROOM)
    assert node.tree.locks == ({held_pages: 1} if held_pages else {})
    node.leave(ROOM)
    node.path.tick()
    assert node.tree.locked == 0


def test_a_request_that_leaves_between_settling_and_admission_releases_what_was_kept() -> None:
    node = DecodeNode()
    node.accept(ROOM)
    operation = node.offer(ROOM)
    node.path.allocated(operation)
    node.serve(ROOM, 0, 2)
    node.end_transfer(operation, got=2)
    assert node.tree.locked == 1
    node.leave(ROOM)
    assert node.tree.locked == 0
    node.path.tick()
    assert not node.reads.reads
    assert not node.tree.finished, "its prefetch had ended"


def test_a_request_that_leaves_while_its_read_goes_on_ends_its_prefetch() -> None:
    node = DecodeNode(host_pages=3)
    node.accept(ROOM)
    operation = node.offer(ROOM)
    node.path.allocated(operation)
    assert node.tree.locked == 1, "what HELLO named may be evicted"
    node.leave(ROOM)
    assert node.tree.finished == [("request", "ABORT")]
    assert operation.terminated
    node.end_transfer(operation, got=0)
    node.path.tick()
    assert not node.reads.reads
    assert node.tree.locked == 0


def test_what_comes_after_the_request_has_left_is_not_kept() -> None:
    node = DecodeNode()
    read = node.accept(ROOM)
    operation = node.offer(ROOM)
    # The prefill engine fell silent after the scheduler had taken the offer, and before it had started the prefetch.
    read.phase = Phase.OFFERED
    node.reads.clock = lambda: read.deadline_s
    node.reads.tick(0.0)
    assert not node.reads.pending(ROOM)
    node.leave(ROOM)
    node.end_transfer(operation, got=2)
    assert node.tree.locked == 0, "nobody is left to release this"


# -- samples of one request, which share its room ----------------------------------------------------------------------


def test_a_sample_that_leaves_does_not_end_the_read_of_another() -> None:
    node = DecodeNode()
    read = node.accept(ROOM)
    node.sample(ROOM, "sample")
    operation = node.offer(ROOM)
    node.path.allocated(operation)
    node.leave(ROOM, "sample")
    assert read.ended is None
    assert node.reads.pending(ROOM)
    assert not operation.terminated
    node.serve(ROOM, 0, 2)
    node.end_transfer(operation, got=2)
    assert node.tree.locked == 1
    node.leave(ROOM, "sample")
    assert node.tree.locked == 1, "another sample released what the read of the first had brought"
    node.leave(ROOM)
    assert node.tree.locked == 0


def test_samples_go_on_when_the_one_that_was_read_for_leaves() -> None:
    node = DecodeNode()
    node.accept(ROOM)
    node.sample(ROOM, "sample")
    operation = node.offer(ROOM)
    node.path.allocated(operation)
    node.leave(ROOM)
    assert not node.reads.pending(ROOM)
    node.end_transfer(operation, got=0)
    node.path.tick()
    node.leave(ROOM, "sample")
    assert node.tree.locked == 0


def test_a_second_read_of_a_room_does_not_hide_the_locks_of_the_first() -> None:
    node = DecodeNode()
    read_two_pages(node)
    node.tree.ongoing.clear()
    node.tree.host_pages = 0
    node.accept(ROOM, "sample")
    operation = node.offer(ROOM)
    node.path.allocated(operation)
    node.serve(ROOM, 0, 2)
    node.end_transfer(operation, got=2)
    node.path.tick()
    assert node.tree.locked == 2
    node.leave(ROOM)
    node.leave(ROOM, "sample")
    assert node.tree.locked == 0


def test_a_flush_forgets_every_lock() -> None:
    node = DecodeNode()
    read_two_pages(node)
    node.reads.abandon_all()
    node.tree.locks.clear()
    node.path.forget()
    node.leave(ROOM)
    assert node.tree.locked == 0


def test_pages_whose_copy_to_host_memory_is_not_acknowledged_are_not_held() -> None:
    """SGLang gives a node its host pages when it queues the copy; on a GPU they hold something else until then."""
    node = DecodeNode(host_pages=5)
    node.tree.ongoing_write_through[1] = SimpleNamespace(node_id=5, lock_params=None, publish_node_ids=[3, 5])
    assert node.path._held_pages(5) == ([], [])
    del node.tree.ongoing_write_through[1]
    slots, held = node.path._held_pages(5)
    assert (len(slots), held) == (5, hashes(0, 5))


# -- write-back --------------------------------------------------------------------------------------------------------


class Storage:
    """A backend that holds the pages before ``end``, or that cannot be asked."""

    def __init__(self, end: int = 0, fault: Exception | None = None) -> None:
        self.end = end
        self.fault = fault
        self.asked: list[list[str]] = []
        self.prefixes: list[list[str] | None] = []

    def batch_exists(self, keys: list[str], extra_info: Any) -> int:
        self.asked.append(keys)
        self.prefixes.append(None if extra_info is None else extra_info.prefix_keys)
        if self.fault is not None:
            raise self.fault
        return len([key for key in keys if int(key.split()[1]) < self.end])


def test_pages_that_storage_holds_are_not_written_back() -> None:
    node = DecodeNode()
    read_two_pages(node)  # of the eight that it was told of
    node.controller.storage_backend = storage = Storage(end=10)
    assert node.path.unwritten(hashes(0, 8), None) == []
    assert not storage.asked, "what a read was told is in storage is asked for again"
    assert node.path.unwritten(hashes(6, 12), None) == [4, 5]
    assert node.path.unwritten(hashes(6, 12), hashes(0, 6)) == [4, 5]
    assert storage.asked == [hashes(8, 12)] * 2
    assert storage.prefixes == [None, hashes(0, 8)], "a store that wants it is told what comes before"


def test_pages_are_written_back_when_storage_cannot_be_asked(caplog: pytest.LogCaptureFixture) -> None:
    node = DecodeNode()
    read_two_pages(node)
    node.controller.storage_backend = Storage(fault=OSError("no route to storage"))
    counted = metrics.FALLBACKS.value(reason="write_back_query_exception")
    with caplog.at_level("WARNING"):
        assert node.path.unwritten(hashes(6, 12), None) == [2, 3, 4, 5]
    assert metrics.FALLBACKS.value(reason="write_back_query_exception") == counted + 1
    (record,) = caplog.records
    assert "4 pages" in record.getMessage()
    assert "no route to storage" in record.getMessage()
