"""The gate in the receiver: SGLang's queue waits for a read by itself, and learns nothing else from it."""

from __future__ import annotations

import threading
import types
from collections import defaultdict
from typing import Any

import pytest
from aiohttp import web
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVReceiver

from sglang_dualpath.connector import kv_classes, mooncake, nixl
from sglang_dualpath.connector.gate import OpenGate
from sglang_dualpath.connector.rooms import real_room
from sglang_dualpath.transfer.base import PlaneGeometry, PoolGeometry
from sglang_dualpath.transfer.mooncake import MooncakeTransport
from sglang_dualpath.transfer.nixl import NixlTransport

RECEIVERS = (mooncake.DualPathMooncakeKVReceiver, nixl.DualPathNixlKVReceiver)
MANAGERS = (mooncake.DualPathMooncakeKVManager, nixl.DualPathNixlKVManager)
SERVERS = (mooncake.DualPathMooncakeKVBootstrapServer, nixl.DualPathNixlKVBootstrapServer)
ROOM = 41
ADDRESS = "10.0.0.1:8998"


class ScriptedGate:
    """Says what a test sets, and notes what it is told."""

    def __init__(self) -> None:
        self.waits = False
        self.asked: list[int] = []
        self.dropped: list[tuple[int, object]] = []
        self.found: list[tuple[int, object, int]] = []

    def pending(self, room: int) -> bool:
        self.asked.append(room)
        return self.waits

    def located(self, room: int, receiver: object, dp_rank: int) -> None:
        self.found.append((room, receiver, dp_rank))

    def gone(self, room: int, receiver: object) -> None:
        self.dropped.append((room, receiver))


class StubManager:
    """As much of SGLang's KV manager as a receiver touches before its transfer."""

    defer_decode_allocation = False
    enable_deferred_decode_kv_release = False
    waiting_timeout = 300.0

    def __init__(self, gate: ScriptedGate) -> None:
        self.gate = gate
        self.request_status: dict[int, KVPoll] = {}
        self.required_prefill_response_num_table: dict[int, int] = {}
        self.prefill_response_tracker: dict[int, set[int]] = {}
        self.addr_to_rooms_tracker: dict[str, set[int]] = defaultdict(set)
        self.failure_records: dict[int, str] = {}
        self.failure_lock = threading.Lock()

    def update_status(self, room: int, status: KVPoll) -> None:
        self.request_status[room] = status

    def check_status(self, room: int) -> KVPoll:
        return self.request_status[room]

    def record_failure(self, room: int, reason: str) -> None:
        self.failure_records[room] = reason


@pytest.fixture
def gate() -> ScriptedGate:
    return ScriptedGate()


@pytest.fixture
def manager(gate: ScriptedGate) -> StubManager:
    return StubManager(gate)


@pytest.fixture(params=RECEIVERS)
def receiver(request: pytest.FixtureRequest, manager: StubManager) -> Any:
    return request.param(manager, ADDRESS, ROOM)


def test_a_request_whose_read_is_pending_is_bootstrapping(
    receiver: Any, manager: StubManager, gate: ScriptedGate
) -> None:
    manager.update_status(ROOM, KVPoll.WaitingForInput)
    gate.waits = True
    assert [receiver.poll() for _ in range(3)] == [KVPoll.Bootstrapping] * 3
    gate.waits = False
    assert receiver.poll() == KVPoll.WaitingForInput
    assert gate.asked == [ROOM] * 4


def test_what_is_still_bootstrapping_is_not_asked_about(receiver: Any, gate: ScriptedGate) -> None:
    assert receiver.poll() == KVPoll.Bootstrapping
    assert gate.asked == []


@pytest.mark.parametrize("status", [KVPoll.Failed, KVPoll.Success, KVPoll.Transferring])
def test_no_other_status_is_overridden(receiver: Any, manager: StubManager, gate: ScriptedGate, status: KVPoll) -> None:
    gate.waits = True
    manager.update_status(ROOM, status)
    assert receiver.poll() == status
    assert gate.asked == []


def test_a_failure_while_the_read_is_pending_is_seen_at_once(
    receiver: Any, manager: StubManager, gate: ScriptedGate
) -> None:
    gate.waits = True
    manager.update_status(ROOM, KVPoll.WaitingForInput)
    assert receiver.poll() == KVPoll.Bootstrapping
    manager.update_status(ROOM, KVPoll.Failed)
    assert receiver.poll() == KVPoll.Failed


def test_an_abort_while_the_read_is_pending_is_seen_at_once(
    receiver: Any, manager: StubManager, gate: ScriptedGate
) -> None:
    gate.waits = True
    manager.update_status(ROOM, KVPoll.WaitingForInput)
    receiver.abort()
    assert receiver.poll() == KVPoll.Failed


def test_after_the_metadata_went_out_the_gate_is_not_asked_again(
    receiver: Any, manager: StubManager, gate: ScriptedGate
) -> None:
    import time

    gate.waits = True
    manager.update_status(ROOM, KVPoll.WaitingForInput)
    receiver.init_time = time.time()
    assert receiver.poll() == KVPoll.WaitingForInput
    assert gate.asked == []


def test_a_transfer_timeout_is_not_overridden(receiver: Any, manager: StubManager, gate: ScriptedGate) -> None:
    gate.waits = True
    manager.update_status(ROOM, KVPoll.WaitingForInput)
    receiver.init_time = 0.0
    receiver.bootstrap_infos = None
    receiver.invalidate_cached_bootstrap_infos = lambda: None
    assert receiver.poll() == KVPoll.Failed


@pytest.mark.parametrize("dp_rank", [0, 1])
def test_the_gate_is_told_which_data_parallel_rank_has_the_request(
    monkeypatch: pytest.MonkeyPatch, receiver: Any, gate: ScriptedGate, dp_rank: int
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(CommonKVReceiver, "init", lambda self, prefill_dp_rank: seen.append(prefill_dp_rank))
    receiver.init(dp_rank)
    assert seen == [dp_rank]
    assert gate.found == [(ROOM, receiver, dp_rank)]


def test_a_cleared_receiver_tells_the_gate(receiver: Any, manager: StubManager, gate: ScriptedGate) -> None:
    receiver.clear()
    assert gate.dropped == [(ROOM, receiver)]
    assert ROOM not in manager.request_status


def test_a_failed_request_tells_the_gate(receiver: Any, manager: StubManager, gate: ScriptedGate) -> None:
    manager.update_status(ROOM, KVPoll.Failed)
    with pytest.raises(Exception, match="unknown reason"):
        receiver.failure_exception()
    assert gate.dropped == [(ROOM, receiver)]


@pytest.mark.parametrize("kind", RECEIVERS)
def test_a_request_without_a_room_tells_nothing(kind: Any, manager: StubManager, gate: ScriptedGate) -> None:
    kind(manager, ADDRESS, None).clear()
    assert gate.dropped == []


@pytest.mark.parametrize("kind", MANAGERS)
def test_a_manager_without_a_read_path_holds_back_nothing(kind: Any) -> None:
    gate = kind.gate
    assert isinstance(gate, OpenGate)
    assert gate.pending(ROOM) is False
    gate.located(ROOM, object(), 0)
    gate.gone(ROOM, object())


def test_a_manager_lends_the_engine_that_it_has_to_the_hop() -> None:
    engine = types.SimpleNamespace(get_session_id=lambda: "10.0.0.1:12345")
    lender = types.SimpleNamespace(engine=engine)
    transport = mooncake.DualPathMooncakeKVManager.transport(lender, object())  # type: ignore[arg-type]
    assert isinstance(transport, MooncakeTransport)
    assert transport.session == "10.0.0.1:12345"
    agent = types.SimpleNamespace(name="an agent")
    transport = nixl.DualPathNixlKVManager.transport(types.SimpleNamespace(agent=agent), object())  # type: ignore[arg-type]
    assert isinstance(transport, NixlTransport)
    assert transport.session == "an agent"


@pytest.mark.parametrize(("stores_own", "registers"), [("10.0.0.1:12345", 0), ("10.0.0.1:777", 2), ("10.0.0.1", 2)])
def test_pages_are_registered_once_with_an_engine_that_the_store_uses_too(stores_own: str, registers: int) -> None:
    """Mooncake refuses memory that overlaps what it has. Its store takes SGLang's engine, under that engine's name."""
    registered: list[int] = []
    engine = types.SimpleNamespace(
        get_session_id=lambda: "10.0.0.1:12345",
        register=lambda address, length: registered.append(address),
        deregister=registered.remove,
    )
    backend = types.SimpleNamespace(store=types.SimpleNamespace(get_hostname=lambda: stores_own))
    lender = types.SimpleNamespace(engine=engine)
    transport = mooncake.DualPathMooncakeKVManager.transport(lender, backend)  # type: ignore[arg-type]
    transport.register(PoolGeometry((PlaneGeometry(0, 64, 64), PlaneGeometry(1 << 20, 64, 64)), 16))
    assert len(registered) == registers
    transport.close()
    assert registered == []


@pytest.mark.parametrize("backend", ["mooncake", "nixl"])
def test_each_class_stands_in_for_its_base(backend: str) -> None:
    classes = kv_classes(backend)
    assert len(classes) == 3
    assert all(issubclass(ours, theirs) for theirs, ours in classes.items())


@pytest.mark.parametrize("backend", ["fake", "mori", "ascend"])
def test_other_backends_are_left_alone(backend: str) -> None:
    assert kv_classes(backend) == {}


@pytest.mark.parametrize("kind", SERVERS)
def test_the_bootstrap_server_has_its_own_routes_and_ours(kind: Any) -> None:
    server: Any = object.__new__(kind)
    server.app = web.Application()
    server._setup_routes()
    paths = {(route.method, getattr(route.resource, "canonical", None)) for route in server.app.router.routes()}
    assert {("PUT", "/dualpath/engines"), ("GET", "/dualpath/engines")} <= paths
    assert {path for _, path in paths} >= {"/route", "/health"}


@pytest.mark.parametrize(
    ("request_fields", "room"),
    [
        ({"bootstrap_room": 7, "bootstrap_host": "10.0.0.1"}, 7),
        ({"bootstrap_room": 0, "bootstrap_host": "10.0.0.1"}, 0),
        ({"bootstrap_room": 7, "bootstrap_host": "2.2.2.2"}, None),
        ({"bootstrap_room": None, "bootstrap_host": "10.0.0.1"}, None),
        ({}, None),
    ],
)
def test_only_requests_that_two_servers_share_have_a_room(request_fields: dict[str, Any], room: int | None) -> None:
    assert real_room(types.SimpleNamespace(**request_fields)) == room
