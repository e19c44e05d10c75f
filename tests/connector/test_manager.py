"""SGLang's transfer workers and a room that is cleared while one looks at it; the rank that its senders name."""

from __future__ import annotations

import threading
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.common import conn
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


def manager_on_rank(
    monkeypatch: pytest.MonkeyPatch, kind: type, base: type, *, system: tuple[int, int], attention: tuple[int, int]
) -> Any:
    """A manager with the data-parallel ranks and sizes that upstream would find, and little else of it."""

    def init(self: Any) -> None:
        (self.system_dp_rank, self.system_dp_size), (self.attn_dp_rank, self.attn_dp_size) = system, attention
        self.is_dummy_cp_rank, self.sender_trace_module = False, ""
        self.request_status, self._staging_outstanding = {}, Counter()
        self._deferred_ack_targets, self._deferred_ack_poisoned_rooms = {}, set()
        self.failure_lock, self.failure_records = threading.Lock(), {}

    monkeypatch.setattr(base, "__init__", init)
    monkeypatch.setattr(conn, "get_observability", lambda: types.SimpleNamespace(enable_trace=False))
    return kind()


def balance(monkeypatch: pytest.MonkeyPatch, method: str) -> list[dict[str, int]]:
    """Two ranks, with this --load-balance-method; what senders register from now on."""
    parallel = types.SimpleNamespace(num_dp_ranks=2, load_balance_method=method)
    monkeypatch.setattr(conn, "get_parallel", lambda: parallel)
    registered: list[dict[str, int]] = []

    def post(url: str, json: dict[str, int], timeout: float) -> Any:
        assert url.endswith("/register_dp_rank")
        registered.append(json)
        return types.SimpleNamespace(status_code=200)

    monkeypatch.setattr(conn.requests, "post", post)
    return registered


BOTH = pytest.mark.parametrize(
    ("kind", "base"), [(OurMooncakeKVManager, MooncakeKVManager), (DualPathNixlKVManager, NixlKVManager)]
)
RANKS = pytest.mark.parametrize(
    ("system", "attention", "rank"),
    [
        pytest.param((0, 2), (0, 1), 0, id="rank 0"),
        pytest.param((1, 2), (0, 1), 1, id="rank 1"),
        pytest.param((0, 1), (1, 2), 1, id="rank 1 of attention data parallelism"),
    ],
)
Of = tuple[int, int]
"""A rank, and how many there are."""


@BOTH
@RANKS
def test_senders_register_the_data_parallel_rank_that_has_a_room(
    monkeypatch: pytest.MonkeyPatch, kind: type, base: type, system: Of, attention: Of, rank: int
) -> None:
    registered = balance(monkeypatch, "round_robin")
    conn.CommonKVSender(manager_on_rank(monkeypatch, kind, base, system=system, attention=attention), "a:1", ROOM)
    assert registered == [{"bootstrap_room": ROOM, "dp_rank": rank}]


@BOTH
@RANKS
def test_senders_follow_the_number_of_a_room(
    monkeypatch: pytest.MonkeyPatch, kind: type, base: type, system: Of, attention: Of, rank: int
) -> None:
    registered = balance(monkeypatch, "follow_bootstrap_room")
    manager = manager_on_rank(monkeypatch, kind, base, system=system, attention=attention)
    for room in (ROOM, NEXT):
        conn.CommonKVSender(manager, "a:1", room)
        assert manager.check_status(room) == (KVPoll.Bootstrapping if room % 2 == rank else KVPoll.Failed)
    assert registered == []


def test_upstream_still_names_rank_0_without_attention_data_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = balance(monkeypatch, "round_robin")
    manager = manager_on_rank(monkeypatch, NixlKVManager, NixlKVManager, system=(1, 2), attention=(0, 1))
    conn.CommonKVSender(manager, "a:1", ROOM)
    assert (registered[0]["dp_rank"] == 1) == native.has(native.DATA_PARALLEL_RANK_OF_A_ROOM)
