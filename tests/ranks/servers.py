"""A prefill and a decode server of several ranks each, in one process: the real reads, paths and pushes of each rank.

The ranks of a server run their scheduler loops in step, as SGLang's do; their storage, hops and control messages take
as long as each of them likes. Rank r of one server speaks to rank r of the other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sglang_dualpath.config import DualPathConfig
from sglang_dualpath.hicache.decode import DecodePath
from sglang_dualpath.hicache.plans import SharedPlans
from sglang_dualpath.hicache.prefill import PrefillPath
from sglang_dualpath.ledger import Reserve
from sglang_dualpath.policy import BalancingPolicy
from sglang_dualpath.protocol import Message
from sglang_dualpath.reader.decode import DecodeReads
from sglang_dualpath.reader.hop import HopReader
from sglang_dualpath.reader.offers import OfferDesk
from sglang_dualpath.reader.own import OwnReaders
from sglang_dualpath.reader.prefetch import ReadLimit
from sglang_dualpath.reader.prefill import PrefillReads
from tests.ranks.hicache import Channels, HiCache, Operation, page_hashes
from tests.ranks.lockstep import ThreadRanks
from tests.reader.cluster import PAGE_BYTES
from tests.reader.hop import Hop
from tests.reader.host import PAGE_TOKENS, Slots, Storage, content, wait_for
from tests.reader.wire import Wire

# Nothing is waited for in vain, on a machine that is busy with other things.
CONFIG = DualPathConfig(
    chunk_bytes=2 * PAGE_BYTES, lease_s=10.0, hello_silence_s=20.0, read_deadline_s=30.0, claims_in_flight=2
)
# For words that do not come.
HASTY = msgspec.structs.replace(CONFIG, lease_s=0.25, hello_silence_s=1.5, read_deadline_s=5.0)
SLOTS, RESERVE = 160, 24
_STEP_S = 0.002


@dataclass(frozen=True)
class Request:
    room: int
    prompt: int
    pages: int

    @property
    def handle(self) -> str:
        return f"request {self.room}"


@dataclass(eq=False)
class Waiting:
    """A request in a decode rank's queue. Also serves as its receiver."""

    request: Request
    cache_request_handle: str
    origin_input_ids: list[int]
    bootstrap_room: int
    extra_key: str | None = None
    cache_salt: str | None = None
    aborted: bool = False


class Rank:
    """One scheduler process: a loop in step with the other ranks' of its server."""

    def __init__(self, servers: Servers, role: str, rank: int, channels: Channels) -> None:
        self.servers = servers
        self.name = f"{role}-{rank}"
        self.rank = rank
        self.ranks = ThreadRanks(channels.scheduler, rank)
        self.pool = Slots(SLOTS)
        self.storage = servers.storages[rank]
        self.wire = servers.wires[rank]
        self.cache = HiCache(rank, channels, self.pool, self.storage, servers.suffix(rank), self.name)
        self.errors: list[BaseException] = []
        self.stall: Callable[[], None] = lambda: None
        """What else holds up this rank's scheduler."""
        self.thread = threading.Thread(target=self._run, name=self.name, daemon=True)

    def _run(self) -> None:
        channel = self.servers.channels[self.name.partition("-")[0]].scheduler
        try:
            while True:
                # As SGLang does: rank 0 receives, and all ranks act on what it received.
                inbox = self.servers.take(self.name) if self.rank == 0 else None
                orders: Any = channel.exchange(self.rank, "orders", inbox)[0]
                for order in orders:
                    if order is None:
                        return
                    order(self)
                self.step()
                self.stall()
                time.sleep(_STEP_S)
        except BaseException as fault:
            self.errors.append(fault)
            channel.end()

    def step(self) -> None:
        raise NotImplementedError

    def check(self, prompt: int, slots: list[int]) -> None:
        """These host pages hold the leading pages of the prompt, this rank's part of them."""
        for page_hash, slot in zip(page_hashes(prompt, 0, len(slots)), slots, strict=True):
            wanted = content(f"{page_hash}{self.servers.suffix(self.rank)}")
            assert self.pool.read(slot) == wanted, f"wrong bytes in {page_hash} on {self.name}"


class PrefillRank(Rank):
    def __init__(self, servers: Servers, rank: int, channels: Channels, policy: BalancingPolicy) -> None:
        super().__init__(servers, "prefill", rank, channels)
        self.done: dict[int, int] = {}
        """Pages that were brought, by room."""
        self._requests: dict[str, Request] = {}
        self.reserve = Reserve(self.pool.alloc(RESERVE))
        self.reads = PrefillReads(config=servers.config, pages=self.pool.pages, reserve=self.reserve)
        size = self.ranks.size
        self.desk = OfferDesk(
            self.reads,
            policy=policy,
            engine=self.name,
            session=self.name,
            send=lambda peer, message: self.wire.send(self.name, peer.decode(), message),
            rank=rank,
            tp_size=size,
        )
        plans = SharedPlans(self.desk, self.ranks) if size > 1 else None
        self.path = PrefillPath(self.cache, self.reads, plans)  # type: ignore[arg-type]
        self.cache.path = self.path
        self.cache.inserted = self._inserted
        self.cache.revoked = self._revoked
        Hop(self.name, self.pool, servers.sessions[rank])
        self.wire.join(self.name, self._heard, lambda: self.desk.tick(0.0))
        self.own = OwnReaders(self.reads, count=1, limit=ReadLimit(0))

    def _heard(self, sender: str, message: Message) -> None:
        self.desk.handle(sender.encode(), message)

    def arrive(self, request: Request) -> None:
        self._requests[request.handle] = request
        self.reads.arrived(request.room, request.handle)
        self.path.starting(request.handle, 0)
        pages = page_hashes(request.prompt, 0, request.pages)
        self.cache.submit(Operation(request.handle, request.prompt, 0, pages, stored=False))

    def abort(self, room: int) -> None:
        request = next((one for one in self._requests.values() if one.room == room), None)
        if request is not None:
            self.cache.abort(request.handle)
            self.reads.gone(request.handle)
            self._end(request, 0)

    def step(self) -> None:
        self.cache.events(self.ranks)
        self.path.tick(list(self.cache.ongoing.values()))

    def _inserted(self, handle: str) -> None:
        request = self._requests[handle]
        slots = self.cache.host.get(request.prompt, [])
        self.check(request.prompt, slots)
        pages = min(len(slots), request.pages)
        self.cache.evict(request.prompt)
        self._end(request, pages)

    def _revoked(self, handle: str) -> None:
        self._end(self._requests[handle], 0)

    def _end(self, request: Request, pages: int) -> None:
        del self._requests[request.handle]
        self.cache.trace.append(("done", request.room, pages))
        self.done[request.room] = pages


class DecodeRank(Rank):
    def __init__(self, servers: Servers, rank: int, channels: Channels) -> None:
        super().__init__(servers, "decode", rank, channels)
        self.promised: dict[int, int] = {}
        """Pages of the prefix that prefill is told not to send, by room."""
        self.queue: list[Waiting] = []
        self.hop = Hop(self.name, self.pool, servers.sessions[rank])
        self.reads = DecodeReads(
            config=servers.config,
            pages=self.pool.pages,
            engine=self.name,
            rank=rank,
            tp_size=self.ranks.size,
            send=lambda endpoint, message: self.wire.send(self.name, endpoint, message),
        )
        self.path = DecodePath(self.cache, self.cache, self.reads, self.ranks)  # type: ignore[arg-type]
        self.cache.path = self.path
        self.cache.inserted = self.path.inserted
        self.cache.revoked = self.path.revoked
        self.wire.join(self.name, self.reads.handle, lambda: self.reads.tick(0.0))
        self.carrier = HopReader(self.reads, self.hop, count=1, limit=ReadLimit(0), pusher_idle_s=0.5)

    def arrive(self, request: Request) -> None:
        tokens = [request.prompt] * (request.pages * PAGE_TOKENS)
        waiting = Waiting(request, request.handle, tokens, request.room)
        read = self.path.accept(waiting, waiting)
        self.queue.append(waiting)
        if read is not None:
            self.reads.sought(read)
            self.servers.later(self.rank, lambda: self.reads.greet(read, f"prefill-{self.rank}"))

    def abort(self, room: int) -> None:
        for waiting in self.queue:
            waiting.aborted |= waiting.request.room == room

    def step(self) -> None:
        self.cache.events(self.ranks)
        for operation in self.cache.ongoing.values():
            if operation.host_indices is not None:
                self.path.allocated(operation)
        self.path.tick()
        for waiting in [waiting for waiting in self.queue if waiting.aborted]:
            self._leave(waiting, -1)
        # SGLang's queue polls all receivers and takes the least over the ranks.
        ready = self.ranks.least([not self.reads.pending(waiting.request.room) for waiting in self.queue])
        for waiting, go in zip(list(self.queue), ready, strict=True):
            if go:
                self._admit(waiting)
        busy = {waiting.request.prompt for waiting in self.queue} | {one.prompt for one in self.cache.ongoing.values()}
        for prompt in list(self.cache.host):
            if prompt not in busy:
                self.cache.evict(prompt)

    def _admit(self, waiting: Waiting) -> None:
        request = waiting.request
        slots = self.cache.host.get(request.prompt, [])[: request.pages]
        self.check(request.prompt, slots)
        self.path.release_kept(request.handle)
        self._leave(waiting, len(slots))

    def _leave(self, waiting: Waiting, pages: int) -> None:
        self.queue.remove(waiting)
        self.path.gone(waiting.request.room, waiting)
        self.cache.trace.append(("promise", waiting.request.room, pages))
        self.promised[waiting.request.room] = pages


Order = Callable[[Any], None] | None


@dataclass
class Servers:
    """Both servers. ``whole_pages``: each rank holds the same pages, as with MLA; else its own part of each."""

    size: int = 2
    policy: Callable[[int], BalancingPolicy] = field(kw_only=True)
    """The prefill server's policy, by rank."""
    whole_pages: bool = False
    config: DualPathConfig = CONFIG

    def __post_init__(self) -> None:
        self.storages = [Storage() for _ in range(self.size)]
        self.wires = [Wire() for _ in range(self.size)]
        self.sessions: list[dict[str, Slots]] = [{} for _ in range(self.size)]
        self.channels = {role: Channels(self.size) for role in ("prefill", "decode")}
        self.greeting_s = [0.0] * self.size
        self._held: dict[int, list[Callable[[], None]]] = {}
        self._orders: dict[str, list[Order]] = {"prefill-0": [], "decode-0": []}
        self._lock = threading.Lock()
        self._timers: list[threading.Timer] = []
        every = range(self.size)
        self.prefill = [PrefillRank(self, rank, self.channels["prefill"], self.policy(rank)) for rank in every]
        self.decode = [DecodeRank(self, rank, self.channels["decode"]) for rank in every]
        self._free = {rank.name: rank.pool.free_count for rank in self.all}
        for rank in self.all:
            rank.thread.start()

    @property
    def all(self) -> list[Rank]:
        return [*self.prefill, *self.decode]

    def suffix(self, rank: int) -> str:
        return "" if self.whole_pages else f"@{rank}"

    def store(self, prompt: int, pages: int) -> None:
        for rank, storage in enumerate(self.storages):
            storage.put([f"{page_hash}{self.suffix(rank)}" for page_hash in page_hashes(prompt, 0, pages)])

    def later(self, rank: int, then: Callable[[], None]) -> None:
        """A rank's look-up of its peer takes its own time, or as long as the test says."""
        with self._lock:
            if rank in self._held:
                self._held[rank].append(then)
                return
        timer = threading.Timer(self.greeting_s[rank], then)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def hold_hello(self, rank: int) -> None:
        """This decode rank says no HELLO before ``let_hello``."""
        with self._lock:
            self._held[rank] = []

    def let_hello(self, rank: int) -> None:
        with self._lock:
            held = self._held.pop(rank)
        for then in held:
            then()

    def order(self, server: str, order: Order) -> None:
        with self._lock:
            self._orders[f"{server}-0"].append(order)

    def take(self, name: str) -> list[Order]:
        with self._lock:
            taken, self._orders[name] = self._orders[name], []
            return taken

    def request(self, request: Request, *, decode_first: bool = True) -> None:
        for server in ("decode", "prefill") if decode_first else ("prefill", "decode"):
            self.order(server, lambda rank: rank.arrive(request))

    def abort(self, room: int) -> None:
        for server in ("prefill", "decode"):
            self.order(server, lambda rank: rank.abort(room))

    def end_of(self, room: int, within_s: float) -> None:
        """Wait until all ranks are through with a request."""
        self.wait(lambda: all(room in rank.done for rank in self.prefill), f"room {room} at prefill", within_s)
        self.wait(lambda: all(room in rank.promised for rank in self.decode), f"room {room} at decode", within_s)

    def wait(self, condition: Callable[[], object], what: str, within_s: float) -> None:
        wait_for(lambda: condition() or self.faults(), what, within_s)
        assert not self.faults(), self.faults()

    def faults(self) -> list[BaseException]:
        return [fault for rank in self.all for fault in (*rank.errors, *rank.cache.errors, *rank.wire.errors)]

    def check(self) -> None:
        """After all requests: ranks did the same, nothing was written where it must not be, and nothing is left."""
        for decode in self.decode:
            self.wait(lambda d=decode: not d.reads.reads and not d.cache.host, f"{decode.name}: reads over", 10.0)
        for prefill in self.prefill:
            self.wait(lambda p=prefill: not p.reads.late and not p.reads.reads, f"{prefill.name}: reads over", 10.0)
            assert prefill.reserve.free == prefill.reserve.size
        for server in (self.prefill, self.decode):
            first, *others = (rank.cache.trace for rank in server)
            for trace in others:
                # The ranks are a few steps apart when this looks.
                assert all(mine == theirs for mine, theirs in zip(first, trace, strict=False))
        for rank in self.all:
            self.wait(lambda r=rank: r.pool.free_count == self._free[r.name], f"host pages of {rank.name} free", 5.0)
            assert not rank.pool.violations
            assert not rank.cache.ongoing
            assert not rank.cache.locks.total()

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        for storage in self.storages:
            storage.gate.set()
        for server in ("prefill", "decode"):
            self.order(server, None)
        for rank in self.all:
            rank.thread.join(10)
            rank.cache.stop()
        for channels in self.channels.values():
            channels.end()
        for decode in self.decode:
            decode.hop.gate.set()
            decode.reads.stop()
            decode.carrier.stop()
        for prefill in self.prefill:
            prefill.reads.stop()
            prefill.own.stop()
        for wire in self.wires:
            wire.close()
        for rank in self.all:
            rank.cache.join()
