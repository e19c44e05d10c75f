"""SGLang's transfer workers and a room that is cleared while one looks at it."""

from __future__ import annotations

import threading
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.common.utils import TransferKVChunk
from sglang.srt.disaggregation.mooncake import MooncakeKVManager
from sglang.srt.disaggregation.nixl import NixlKVManager

from sglang_dualpath.compat import native
from sglang_dualpath.connector.mooncake import KV_CLASSES
from sglang_dualpath.connector.nixl import DualPathNixlKVManager

OurMooncakeKVManager = KV_CLASSES[MooncakeKVManager]
ROOM, NEXT = 41, 42
MOST_LOOKS = 20


class Watched(dict[int, KVPoll]):
    """The status of rooms. After so many looks at ROOM, whatever they are, ``then`` is called once."""

    def __init__(self, looks: int, then: Callable[[], None]) -> None:
        super().__init__({ROOM: KVPoll.WaitingForInput, NEXT: KVPoll.WaitingForInput})
        self.left = looks
        self._then = then

    def _looked(self, room: object) -> None:
        if room == ROOM:
            self.left -= 1
            if self.left == 0:
                self._then()

    def __contains__(self, room: object) -> bool:
        found = super().__contains__(room)
        self._looked(room)
        return found

    def __getitem__(self, room: int) -> KVPoll:
        status = super().__getitem__(room)
        self._looked(room)
        return status

    def get(self, room: int, default: Any = None) -> Any:
        status = super().get(room, default)
        self._looked(room)
        return status


class NoMoreChunks(BaseException):
    """Ends a worker that still takes chunks. No worker catches it."""


class Chunks:
    """A worker's queue: the last chunk of each room, of requests for which another rank sends."""

    def __init__(self, *rooms: int) -> None:
        self._rooms = list(rooms)

    def get(self) -> TransferKVChunk:
        if not self._rooms:
            raise NoMoreChunks
        return TransferKVChunk(self._rooms.pop(0), np.zeros(0, np.int32), slice(0, 0), True, None, None)


def manager_of(kind: type, looks: int) -> Any:
    """As much of a manager as its worker touches; ROOM is cleared after ``looks`` looks at it."""
    manager: Any = object.__new__(kind)
    manager.enable_trace = manager.enable_staging = manager.enable_deferred_decode_kv_release = False
    manager.deferred_bootstrap = None
    manager.transfer_infos = {room: {"peer": types.SimpleNamespace(room=room, is_dummy=True)} for room in (ROOM, NEXT)}
    manager.req_to_decode_prefix_len = {}
    manager.failure_lock, manager.failure_records = threading.Lock(), {}
    manager._staging_outstanding = Counter()
    manager._deferred_ack_targets, manager._deferred_ack_poisoned_rooms = {}, set()
    manager.bootstrap_port = 8998

    def clear() -> None:
        """As a sender does it."""
        manager.request_status.pop(ROOM, None)
        manager.transfer_infos.pop(ROOM, None)

    manager.request_status = Watched(looks, clear)
    return manager


def outlives(manager: Any) -> bool:
    """Whether the worker takes all chunks, and asks for more."""
    try:
        manager.transfer_worker(Chunks(ROOM, NEXT), None)
    except NoMoreChunks:
        return True
    except RuntimeError as fault:
        if not isinstance(fault.__context__, KeyError):
            raise
    return False


def looks_that_end(kind: type) -> list[int]:
    """After which looks at its status a room that is cleared ends the worker."""
    fatal = []
    for looks in range(1, MOST_LOOKS):
        manager = manager_of(kind, looks)
        if not outlives(manager):
            fatal.append(looks)
            continue
        assert manager.request_status.get(NEXT) == KVPoll.Success
        if manager.request_status.left > 0:  # a worker does not look that often
            return fatal
    pytest.fail(f"a worker looks more than {MOST_LOOKS} times at a room")


@pytest.mark.parametrize("kind", [OurMooncakeKVManager, DualPathNixlKVManager])
def test_a_worker_outlives_a_room_that_is_cleared_at_any_time(kind: type) -> None:
    assert looks_that_end(kind) == []


def test_upstreams_mooncake_still_needs_that_and_its_nixl_does_not() -> None:
    assert bool(looks_that_end(MooncakeKVManager)) != native.has(native.STATUS_OF_A_CLEARED_ROOM)
    assert not looks_that_end(NixlKVManager)


def test_a_room_that_is_cleared_has_failed_for_mooncake() -> None:
    manager = manager_of(OurMooncakeKVManager, MOST_LOOKS)
    assert manager.check_status(ROOM) == KVPoll.WaitingForInput
    assert manager.check_status(ROOM + NEXT) == KVPoll.Failed
