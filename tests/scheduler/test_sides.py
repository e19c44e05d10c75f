"""Which engine a request's HELLO goes to, when several ranks reissue a parked prefetch, and how much each may read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dualpath.config import DualPathConfig
from sglang_dualpath.errors import DualPathError
from sglang_dualpath.scheduler.sides import DecodeSide, PrefillSide, _part_of, _reachable, _within

ROOM = 7
ADDRESS = "10.0.0.1:8998"
HANDLE = "request"


class Decode:
    """A decode side whose queue has just been offered a request."""

    def __init__(self, rank: int = 0) -> None:
        self.sought: list[object] = []
        self.greeted: list[tuple[object, ...]] = []
        self.receiver: Any = SimpleNamespace(bootstrap_addr=ADDRESS)
        self.req: Any = SimpleNamespace(bootstrap_room=ROOM)
        side: Any = object.__new__(DecodeSide)
        side._queue = SimpleNamespace(
            queue=[SimpleNamespace(req=self.req, is_rebootstrap=False, kv_receiver=self.receiver)]
        )
        side._ranks = SimpleNamespace(rank=rank, size=2)
        side._lookup = SimpleNamespace(find=self._find)
        side._unequal = set()
        side.reads = SimpleNamespace(
            sought=self.sought.append, greet=lambda read, endpoint, *why: self.greeted.append((read, endpoint, *why))
        )
        side.path = SimpleNamespace(accept=self._accept, read_for=self._read_for)
        self.side: DecodeSide = side
        self._reads: dict[object, str] = {}

    def _accept(self, req: object, receiver: object) -> str:
        self._reads[id(receiver)] = "read"
        return "read"

    def _read_for(self, room: int, receiver: object) -> str | None:
        return self._reads.get(id(receiver)) if room == ROOM else None

    def _find(self, address: str, *, dp_rank: int, tp_rank: int, then: Callable[[str], None]) -> None:
        then(f"{address} dp {dp_rank} tp {tp_rank}")


@pytest.mark.parametrize("rank", [0, 1])
def test_hello_goes_to_the_rank_of_the_same_number(rank: int) -> None:
    decode = Decode(rank)
    decode.receiver.prefill_dp_rank = 0
    decode.side.added(decode.req)
    assert decode.greeted == [("read", f"{ADDRESS} dp 0 tp {rank}")]
    assert decode.sought == ["read"]


def test_hello_waits_until_sglang_knows_the_data_parallel_rank() -> None:
    decode = Decode()
    decode.side.added(decode.req)
    assert not decode.greeted
    assert not decode.sought, "a prefill engine that nobody has asked is not silent"
    decode.side.located(ROOM, decode.receiver, 1)
    assert decode.greeted == [("read", f"{ADDRESS} dp 1 tp 0")]


def test_a_prefill_server_of_another_tensor_parallel_size_is_not_greeted(caplog: pytest.LogCaptureFixture) -> None:
    decode = Decode()
    decode.side.added(decode.req)
    decode.receiver.prefill_info = SimpleNamespace(attn_tp_size=4)
    for _ in range(2):
        decode.side.located(ROOM, decode.receiver, 0)
    assert decode.greeted == [("read", None, "tp_size")] * 2
    assert not decode.sought
    (record,) = caplog.records
    assert "--tp-size 4, this one 2" in record.getMessage()


def test_a_receiver_without_a_read_greets_nobody() -> None:
    decode = Decode()
    decode.side.located(ROOM, decode.receiver, 1)  # SGLang knows at once: the queue has not accepted it yet
    decode.side.located(ROOM, object(), 1)  # a rebootstrapped request in the same room
    assert not decode.greeted


class Prefill:
    """A prefill side with one parked prefetch."""

    def __init__(self, others_are_due: bool) -> None:
        self.reissued: list[object] = []
        self.now_s = 0.0
        self.req = SimpleNamespace(cache_request_handle=HANDLE, pending_bootstrap=True)
        self.asked: list[list[int]] = []
        side: Any = object.__new__(PrefillSide)
        side._parked = {}
        side.reads = SimpleNamespace(clock=lambda: self.now_s, parked=lambda handle, reason: None)
        side._queue = SimpleNamespace(queue=[self.req])
        side._scheduler = SimpleNamespace(
            _prefetch_kvcache=self.reissued.append,
            tree_cache=SimpleNamespace(cache_controller=SimpleNamespace(prefetch_rate_limited=lambda: False)),
        )

        def least(values: Sequence[int]) -> list[int]:
            self.asked.append(list(values))
            return [int(value and others_are_due) for value in values]

        side._ranks = SimpleNamespace(least=least)
        self.side: PrefillSide = side


@pytest.mark.parametrize("others_are_due", [True, False])
def test_a_parked_prefetch_is_reissued_when_it_is_due_on_every_rank(others_are_due: bool) -> None:
    prefill = Prefill(others_are_due)
    prefill.side._park(HANDLE, "host_pool_full")
    prefill.side.tick()
    assert prefill.reissued == []
    prefill.now_s += 1.0
    prefill.side.tick()
    assert prefill.reissued == ([prefill.req] if others_are_due else [])
    assert prefill.asked == [[False], [True]]


def test_without_parked_prefetches_no_rank_is_asked() -> None:
    prefill = Prefill(True)
    prefill.side.tick()
    assert prefill.asked == []


@pytest.mark.parametrize(
    ("limit", "tp_size", "dp_size", "part"), [(1000, 1, 1, 1000), (1000, 2, 2, 250), (1, 2, 1, 1), (0, 2, 2, 0)]
)
def test_engines_of_a_server_share_its_read_rate_limit(limit: int, tp_size: int, dp_size: int, part: int) -> None:
    manager = SimpleNamespace(attn_tp_size=tp_size, system_dp_size=dp_size)
    config = DualPathConfig(read_rate_limit_bytes_per_s=limit)
    assert _part_of(config, manager).read_rate_limit_bytes_per_s == part


def test_reads_end_before_sglang_fails_the_requests_that_wait_for_them(caplog: pytest.LogCaptureFixture) -> None:
    config = DualPathConfig(read_deadline_s=120.0, lease_s=2.0)
    assert _within(config, 300) is config
    with caplog.at_level("WARNING"):
        assert _within(config, 60).read_deadline_s == 30
    assert "Reads end after 30 s instead of --dualpath-read-deadline 120" in caplog.text
    with pytest.raises(DualPathError, match="SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT=4 leaves reads 2 s"):
        _within(config, 4)


@pytest.mark.parametrize(
    ("bound", "address", "published"),
    [
        ("tcp://10.0.0.5:7000", "10.0.0.1", "tcp://10.0.0.5:7000"),
        ("tcp://0.0.0.0:7000", "10.0.0.1", "tcp://10.0.0.1:7000"),
        ("tcp://[::]:7000", "fd00::1", "tcp://[fd00::1]:7000"),
        ("tcp://[fd00::2]:7000", "fd00::1", "tcp://[fd00::2]:7000"),
    ],
)
def test_an_address_that_is_every_one_is_not_published(bound: str, address: str, published: str) -> None:
    assert _reachable(bound, address) == published
