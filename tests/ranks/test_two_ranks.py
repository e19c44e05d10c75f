"""Two ranks on both servers: whatever each of them sees, and when, they do the same, and no request waits for ever."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from sglang_dualpath import metrics
from sglang_dualpath.config import DualPathConfig
from sglang_dualpath.errors import TransferError
from sglang_dualpath.policy import load_policy
from sglang_dualpath.protocol import Claim, Grant, Hello, Message, NoOffer, Offer
from tests.ranks.servers import CONFIG, HASTY, Request, Servers

NO_HELLO = 'sglang_dualpath_fallbacks_total{reason="no_hello"}'
DEAF_AFTER = 4
DEADLINE_S = CONFIG.read_deadline_s + 5.0
PAGES = 18


@contextmanager
def running(
    policy: str = "split", *others: str, size: int = 2, whole_pages: bool = False, config: DualPathConfig = CONFIG
) -> Iterator[Servers]:
    """Servers whose rank 0 has the first policy, and whose last ranks have the last."""
    before = set(threading.enumerate())
    policies = [policy, *others]
    servers = Servers(
        size,
        policy=lambda rank: load_policy(policies[min(rank, len(others))]),
        whole_pages=whole_pages,
        config=config,
    )
    try:
        yield servers
    finally:
        servers.close()
    end = time.monotonic() + 5
    while set(threading.enumerate()) - before:
        assert time.monotonic() < end, set(threading.enumerate()) - before
        time.sleep(0.01)


def one_request(servers: Servers, pages: int = PAGES) -> tuple[list[int], list[int]]:
    """A request whose pages are all in storage; what each rank brought on prefill, and promised on decode."""
    servers.store(1, pages)
    servers.request(Request(1, 1, pages))
    return end_of_request(servers)


def end_of_request(servers: Servers) -> tuple[list[int], list[int]]:
    servers.end_of(1, DEADLINE_S)
    return [rank.done[1] for rank in servers.prefill], [rank.promised[1] for rank in servers.decode]


def sent(servers: Servers, kind: type[Message]) -> list[int]:
    """How many messages of a kind went between each pair of ranks."""
    return [len(wire.sent(kind)) for wire in servers.wires]


@pytest.mark.parametrize("whole_pages", [False, True], ids=["own heads", "whole pages"])
@pytest.mark.parametrize("policy", ["split", "decode", "shorter_queue", "prefill"])
def test_all_pages_come_for_every_policy(policy: str, whole_pages: bool) -> None:
    with running(policy, whole_pages=whole_pages) as servers:
        done, promised = one_request(servers)
        assert done == [PAGES, PAGES]
        assert promised[0] == promised[1]
        assert (promised[0] == PAGES) == (policy == "decode")
        assert all(sent(servers, Offer)) == (policy in ("split", "decode"))
        servers.check()


@pytest.mark.parametrize("first", ["decode", "shorter_queue"])
def test_rank_0_says_who_reads(first: str) -> None:
    """Ranks see queues and rates of their own, so that each would decide for itself; here by another policy."""
    other = "shorter_queue" if first == "decode" else "decode"
    with running(first, other) as servers:
        done, promised = one_request(servers)
        assert done == [PAGES, PAGES]
        assert promised == ([PAGES, PAGES] if first == "decode" else [0, 0])
        assert sent(servers, Offer) == ([1, 1] if first == "decode" else [0, 0])
        servers.check()


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("policy", ["split", "decode"])
def test_a_hello_that_is_late_on_one_rank_is_waited_for(late: int, policy: str) -> None:
    with running(policy) as servers:
        servers.greeting_s[late] = 0.15  # much less than it is waited for
        for prefill in servers.prefill:
            prefill.own.stop()  # who would be through by then
        done, promised = one_request(servers)
        assert done == [PAGES, PAGES]
        assert promised == [PAGES, PAGES]
        servers.check()


def deaf(servers: Servers) -> None:
    """Prefill engines wait for a HELLO a moment only, as after several that did not come."""
    for prefill in servers.prefill:
        prefill.reads.silent_requests = DEAF_AFTER


def request_without_hello(servers: Servers, late: tuple[int, ...]) -> None:
    """A request whose HELLOs of some ranks have not come in time. Prefill, deaf, has begun to read; nobody ends it yet.

    The other HELLOs are there before prefill has the request: how long it waits for them is not what is tested.
    """
    deaf(servers)
    for rank in late:
        servers.hold_hello(rank)
    for storage in servers.storages:
        storage.gate.clear()
    servers.store(1, PAGES)
    request = Request(1, 1, PAGES)
    others = [prefill.reads for rank, prefill in enumerate(servers.prefill) if rank not in late]
    servers.order("decode", lambda rank: rank.arrive(request))
    servers.wait(lambda: all(1 in reads.rooms for reads in others), "the other HELLOs", DEADLINE_S)
    servers.order("prefill", lambda rank: rank.arrive(request))

    def unheard(rank: int) -> bool:
        read = servers.prefill[rank].reads.by_number.get((1, 0))
        return read is not None and read.unheard

    servers.wait(lambda: all(unheard(rank) for rank in late), "prefill waits no longer", DEADLINE_S)


@pytest.mark.parametrize("late", [0, 1])
def test_a_hello_that_is_too_late_on_one_rank_is_refused_on_all(late: int) -> None:
    with running("decode") as servers:
        request_without_hello(servers, (late,))
        if late == 1:
            servers.let_hello(late)
        servers.wait(lambda: sent(servers, NoOffer)[1], "rank 1 is refused", DEADLINE_S)
        for storage in servers.storages:
            storage.gate.set()
        done, promised = end_of_request(servers)
        assert done == [PAGES, PAGES]
        assert promised == [0, 0]
        # Rank 0 without its own decides for all before it comes, and then it is not sent any more.
        if late == 0:
            servers.let_hello(late)
        assert sent(servers, Hello) == ([0, 1] if late == 0 else [1, 1])
        assert sent(servers, NoOffer)[1] == 1
        servers.check()


@pytest.mark.parametrize("late", [(0,), (1,), (0, 1)], ids=str)
def test_a_late_hello_gets_a_share_of_what_is_left(late: tuple[int, ...]) -> None:
    with running("split") as servers:
        request_without_hello(servers, late)
        for rank in late:
            servers.let_hello(rank)
        servers.wait(lambda: all(sent(servers, Grant)), "both ranks claim", DEADLINE_S)
        for storage in servers.storages:
            storage.gate.set()
        done, promised = end_of_request(servers)
        assert done == [PAGES, PAGES]
        assert promised[0] == promised[1]
        assert all(sent(servers, Offer))
        assert all(rank.hop.pushes for rank in servers.decode)
        servers.check()


def test_a_scheduler_that_takes_its_time_is_no_missing_hello() -> None:
    """Rank 0 decides in its scheduler's turns, and one of those may take longer than a HELLO is waited for."""
    with running("decode") as servers:
        deaf(servers)
        for prefill in servers.prefill:
            prefill.stall = lambda: time.sleep(0.2)
        before = metrics.snapshot().get(NO_HELLO, 0.0)
        done, promised = one_request(servers)
        assert done == [PAGES, PAGES]
        assert promised[0] == promised[1]
        assert all(sent(servers, Offer))
        assert metrics.snapshot().get(NO_HELLO, 0.0) == before
        servers.check()


@pytest.mark.parametrize("slow", [0, 1])
def test_the_prefix_that_is_promised_is_that_of_the_rank_that_read_least(slow: int) -> None:
    with running() as servers:
        # On one rank the two sides share one slow disk and meet early; on the other, decode is the fast one.
        servers.storages[slow].latency_s = 0.03
        servers.prefill[1 - slow].own.stop()
        done, promised = one_request(servers)
        landed = [rank.hop.pushes for rank in servers.decode]
        assert done == [PAGES, PAGES]
        assert promised[0] == promised[1] < PAGES
        assert landed[1 - slow] > landed[slow]
        servers.check()


@pytest.mark.parametrize("deaf", [0, 1])
def test_a_rank_without_a_decode_engine_leaves_all_of_them_without(deaf: int) -> None:
    """HELLO of one pair of ranks is lost. The other pair has an offer, and must not act on it alone."""
    with running("decode", config=HASTY) as servers:
        servers.wires[deaf].lose = lambda sender, receiver, message: True
        done, promised = one_request(servers)
        assert done == [PAGES, PAGES]
        assert promised == [0, 0]
        assert [rank.hop.pushes for rank in servers.decode] == [0, 0]
        servers.check()


@pytest.mark.parametrize("refusing", [0, 1])
def test_an_offer_that_one_rank_cannot_make_is_taken_by_none(refusing: int) -> None:
    with running() as servers:
        reserve = servers.prefill[refusing].reserve
        reserve.back(reserve.free)  # as with late writers everywhere
        servers.store(1, PAGES)
        servers.request(Request(1, 1, PAGES))
        servers.end_of(1, DEADLINE_S)
        assert sent(servers, NoOffer)[refusing] == 1
        assert sent(servers, Claim) == [0, 0]
        assert [rank.promised[1] for rank in servers.decode] == [0, 0]
        reserve.unback(reserve.size)
        servers.check()


def test_pages_that_one_rank_has_not_in_storage_are_read_by_none() -> None:
    with running("decode") as servers:
        servers.store(1, PAGES)
        for page in range(7, PAGES):
            del servers.storages[1].pages[f"p1:{page}@1"]
        servers.request(Request(1, 1, PAGES))
        servers.end_of(1, DEADLINE_S)
        assert [rank.done[1] for rank in servers.prefill] == [7, 7]
        assert [rank.promised[1] for rank in servers.decode] == [7, 7]
        servers.check()


def test_pages_that_one_rank_cannot_read_end_the_prefix_of_all() -> None:
    with running() as servers:

        def fault(hashes: Sequence[str]) -> None:
            if any(int(page_hash.split(":")[1].partition("@")[0]) >= 5 for page_hash in hashes):
                raise OSError("a bad block")

        servers.storages[1].fault = fault
        done, promised = one_request(servers)
        assert done[0] == done[1] <= 5
        assert promised[0] == promised[1] <= 5
        servers.check()


def test_a_rank_whose_hop_is_broken_is_read_for_by_its_own_prefill_engine() -> None:
    with running("decode") as servers:

        def fault(session: str) -> None:
            raise TransferError("no route")

        servers.decode[0].hop.fault = fault
        done, promised = one_request(servers)
        assert done == [PAGES, PAGES]
        assert promised[0] == promised[1]
        servers.check()


def test_a_frozen_rank_holds_up_the_others_by_its_leases_alone() -> None:
    with running("decode", config=HASTY) as servers:
        servers.decode[1].hop.gate.clear()
        threading.Timer(1.0, servers.decode[1].hop.gate.set).start()
        start = time.monotonic()
        servers.store(1, PAGES)
        servers.request(Request(1, 1, PAGES))
        servers.wait(lambda: all(1 in rank.done for rank in servers.prefill), "prefill is done", DEADLINE_S)
        assert time.monotonic() - start < HASTY.read_deadline_s
        servers.end_of(1, DEADLINE_S)
        servers.check()


def test_an_abort_in_the_middle_leaves_nothing() -> None:
    with running() as servers:
        for storage in servers.storages:
            storage.latency_s = 0.02
        servers.store(1, PAGES)
        servers.request(Request(1, 1, PAGES))
        servers.wait(lambda: all(storage.in_flight for storage in servers.storages), "both ranks read", DEADLINE_S)
        servers.abort(1)
        servers.end_of(1, DEADLINE_S)
        servers.check()


def test_one_rank_asks_nobody() -> None:
    """Tensor parallel 1: no collective of ours, and rank 0 plans as HELLO comes."""
    with running("decode", size=1) as servers:
        assert one_request(servers) == ([PAGES], [PAGES])
        assert servers.prefill[0].path._plans is None
        servers.check()


# -- all at once, by a seed --------------------------------------------------------------------------------------------


class Weather:
    """Each rank has its own, by a seed: slow and failing storage and hops, slow, lost and doubled messages, stalls."""

    def __init__(self, servers: Servers, seed: int) -> None:
        source = random.Random(seed)
        self._faults = source.random() < 0.6
        for rank in range(servers.size):
            mine = random.Random(source.random())
            servers.greeting_s[rank] = mine.choice([0.0, 0.0, 0.01, 0.1])
            servers.storages[rank].latency_s = mine.choice([0.0, 0.002, 0.01])
            servers.storages[rank].fault = self._sometimes(mine, 0.02, OSError("a bad block"))
            servers.decode[rank].hop.latency_s = mine.choice([0.0, 0.005, 0.02])
            servers.decode[rank].hop.fault = self._sometimes(mine, 0.02, TransferError("no route"))
            wire = servers.wires[rank]
            wire.delay_s, wire.jitter_s = mine.choice([0.0, 0.01, 0.05]), mine.choice([0.0, 0.01])
            if self._faults:
                wire.lose = self._chance(mine, 0.01)
                wire.double = self._chance(mine, 0.02)
            for node in (servers.prefill[rank], servers.decode[rank]):
                node.stall = lambda mine=mine: time.sleep(0.02) if mine.random() < 0.02 else None

    def _sometimes(self, source: random.Random, share: float, fault: Exception) -> Callable[[object], None]:
        def strike(about: object) -> None:
            if self._faults and source.random() < share:
                raise fault
            if source.random() < 0.02:
                time.sleep(0.1)

        return strike

    @staticmethod
    def _chance(source: random.Random, share: float) -> Callable[..., bool]:
        return lambda *about: source.random() < share


@pytest.mark.parametrize("seed", range(6))
def test_ranks_in_different_weather_do_the_same(seed: int) -> None:
    source = random.Random(seed)
    policy, whole_pages = source.choice(["split", "decode"]), source.random() < 0.5
    with running(policy, whole_pages=whole_pages, config=HASTY) as servers:
        Weather(servers, seed)
        rooms = range(1, 13)
        for prompt in range(6):
            servers.store(prompt, source.randrange(1, 24))
        for room in rooms:
            request = Request(room, source.randrange(6), source.randrange(1, 24))
            servers.request(request, decode_first=source.random() < 0.7)
            if source.random() < 0.15:
                threading.Timer(source.uniform(0, 0.2), servers.abort, (room,)).start()
            time.sleep(source.choice([0.0, 0.0, 0.02, 0.05]))
        for room in rooms:
            servers.end_of(room, DEADLINE_S)
        servers.check()
