"""SGLang's transfer worker and a room that is cleared while the worker looks at it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.common.utils import FastQueue, TransferKVChunk
from sglang.srt.disaggregation.mooncake import MooncakeKVManager

from sglang_dualpath.connector.mooncake import DualPathMooncakeKVManager

ROOM = 41


class ClearedBetweenLooks(dict[int, KVPoll]):
    """The second time that somebody sees the room in here, the scheduler clears it right afterwards."""

    looks = 0

    def __contains__(self, room: object) -> bool:
        found = super().__contains__(room)
        self.looks += 1
        if self.looks == 2 and isinstance(room, int):
            del self[room]
        return found


def manager_of(kind: type[MooncakeKVManager]) -> Any:
    """As much of a manager as the worker touches for a chunk that has nobody to go to."""
    manager: Any = object.__new__(kind)
    manager.enable_trace = manager.enable_staging = manager.enable_deferred_decode_kv_release = False
    manager.request_status = ClearedBetweenLooks({ROOM: KVPoll.Success})
    manager.transfer_infos, manager.req_to_decode_prefix_len = {}, {}
    manager._staging_outstanding = Counter()
    manager._deferred_ack_targets, manager._deferred_ack_poisoned_rooms = {}, set()
    manager.bootstrap_port = 8998
    return manager


def run_worker(manager: Any) -> None:
    queue = FastQueue()
    queue.put(TransferKVChunk(ROOM, np.zeros(0, np.int32), slice(0, 0), True, None, None))
    queue.put(None)
    manager.transfer_worker(queue, None)


def test_the_worker_outlives_a_room_that_is_cleared_meanwhile() -> None:
    manager = manager_of(DualPathMooncakeKVManager)
    run_worker(manager)
    assert manager.request_status.looks == 2
    assert ROOM not in manager._staging_outstanding


def test_upstream_still_needs_that() -> None:
    with pytest.raises(RuntimeError, match="Transfer thread failed"):
        run_worker(manager_of(MooncakeKVManager))


def test_a_known_room_keeps_its_status() -> None:
    manager = manager_of(DualPathMooncakeKVManager)
    assert manager.check_status(ROOM) == KVPoll.Success
    assert manager.check_status(ROOM + 1) == KVPoll.Failed
