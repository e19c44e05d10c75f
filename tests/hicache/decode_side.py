"""A decode engine's path and real reads over as much of SGLang's tree and controller as they touch."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from sglang_dualpath.hicache.decode import DecodePath, DualPathDecodeTree
from sglang_dualpath.hicache.ranks import Ranks
from sglang_dualpath.protocol import Claim, Grant, Message, Offer, Plane, Refuse, Target
from sglang_dualpath.reader.decode import DecodeRead, DecodeReads
from tests.reader.cluster import CONFIG
from tests.reader.host import PAGE_TOKENS, Slots

PREFILL = "prefill-1"
ROOT = "root"
DEVICE_ONLY = "device only"


@dataclass(eq=False)
class Operation:
    """SGLang's prefetch operation."""

    handle: Any
    storage_start: int
    hash_value: list[str]
    host_indices: torch.Tensor
    terminated: bool = False

    def is_terminated(self) -> bool:
        return self.terminated


@dataclass
class Request:
    bootstrap_room: int
    cache_request_handle: str
    origin_input_ids: list[int]
    extra_key: str | None = None
    cache_salt: str | None = None


@dataclass
class Tree:
    """One prompt, of which ``host_pages`` leading pages are in host memory, each length with a node of its own."""

    pool: Slots
    host_pages: int = 0
    prefetch_threshold: int = PAGE_TOKENS
    hicache_storage_pass_prefix_keys: bool = False
    locks: Counter[Any] = field(default_factory=Counter)
    ongoing: dict[Any, Operation] = field(default_factory=dict)
    finished: list[Any] = field(default_factory=list)
    most_at_once: int = 99
    """SGLang refuses to prefetch for more requests."""
    ongoing_write_through: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slots = self.pool.alloc(16)
        self.tree_core = SimpleNamespace(
            collect_path_info=lambda nodes: [self._path(nodes[0])],
            build_storage_backup_spec=lambda node, force: None
            if node == DEVICE_ONLY
            else SimpleNamespace(host_value=self.pool.pages.indices(self.slots[:node]), hash_value=hashes(0, node)),
        )
        self.device_tail = False
        """The match ends in a node that is in device memory alone."""

    @property
    def ongoing_prefetch(self) -> dict[Any, Operation]:
        return self.ongoing

    lock_host = DualPathDecodeTree.lock_host
    unlock_host = DualPathDecodeTree.unlock_host

    def _path(self, node: Any) -> list[Any]:
        nodes = [self.host_pages, DEVICE_ONLY] if node == DEVICE_ONLY else [node]
        return [SimpleNamespace(node_id=node) for node in nodes if node != ROOT]

    def swa_reprefill_tail_tokens(self, req: Any) -> int:
        return 0

    def match_prefix(self, params: Any) -> Any:
        return SimpleNamespace(
            device_prefix_len=0,
            host_hit_length=self.host_pages * PAGE_TOKENS,
            last_host_node=DEVICE_ONLY if self.device_tail else self.host_pages or ROOT,
        )

    def is_root(self, node: Any) -> bool:
        return bool(node == ROOT)

    def is_backuped(self, node: Any) -> bool:
        return not self.is_root(node) and node != DEVICE_ONLY

    def get_last_hash_value(self, node: Any) -> None:
        return None

    def inc_host_lock_ref(self, node: Any) -> Any:
        assert node != DEVICE_ONLY, "holds nothing, and its id may be unknown when it is to be released"
        self.locks[node] += 1
        return SimpleNamespace(to_dec_params=lambda: ("receipt", node))

    def dec_host_lock_ref(self, node: Any, receipt: Any) -> None:
        assert receipt == ("receipt", node)
        self.locks[node] -= 1
        assert self.locks[node] >= 0, "unlocked twice"

    @property
    def locked(self) -> int:
        return self.locks.total()

    def prefetch_from_storage(
        self, handle: Any, *args: Any, matched_prefix_tokens: Sequence[int], storage_hit_end: int, **kwargs: Any
    ) -> None:
        if len(self.ongoing) >= self.most_at_once:
            return
        first, end = len(matched_prefix_tokens) // PAGE_TOKENS, storage_hit_end // PAGE_TOKENS
        indices = self.pool.pages.indices(self.pool.alloc(end - first))
        self.ongoing[handle] = Operation(handle, first * PAGE_TOKENS, hashes(first, end), indices)

    def has_ongoing_prefetch(self, handle: Any) -> bool:
        return handle in self.ongoing

    def pop_prefetch_loaded_tokens(self, handle: Any) -> int:
        return 0

    def finish(self, handle: Any, outcome: Any) -> None:
        self.finished.append((handle, outcome.name))
        if handle in self.ongoing:
            self.ongoing.pop(handle).terminated = True


def hashes(first: int, end: int) -> list[str]:
    return [f"page {page}" for page in range(first, end)]


class DecodeNode:
    """The path, and the two ends that it lies between: a tree below, and a prefill engine that the test plays."""

    def __init__(self, *, host_pages: int = 0, ranks: Ranks | None = None) -> None:
        self.pool = Slots(64)
        self.tree = Tree(self.pool, host_pages)
        self.said: list[Message] = []
        self.receivers: dict[str, object] = {}
        self.reads = DecodeReads(
            config=CONFIG,
            pages=self.pool.pages,
            engine="decode-1",
            rank=0,
            send=lambda endpoint, message: self.said.append(message),
        )
        controller: Any = SimpleNamespace(
            storage_stop_event=threading.Event(),
            storage_backend=None,
            read_pages=lambda operation, first, indices: len(indices) // PAGE_TOKENS,
        )
        self.controller = controller
        self.path = DecodePath(self.tree, controller, self.reads, ranks)  # type: ignore[arg-type]

    def accept(self, room: int, name: str = "request", pages: int = 8) -> DecodeRead:
        """The queue takes a request, and its prefill engine is found."""
        self.receivers[name] = object()
        request = Request(room, name, list(range(pages * PAGE_TOKENS)))
        read = self.path.accept(request, self.receivers[name])
        assert read is not None
        self.reads.greet(read, PREFILL)
        return read

    def sample(self, room: int, name: str, pages: int = 8) -> None:
        """Another sample of a request whose read goes on."""
        self.receivers[name] = object()
        request = Request(room, name, list(range(pages * PAGE_TOKENS)))
        assert self.path.accept(request, self.receivers[name]) is None

    def leave(self, room: int, name: str = "request") -> None:
        """SGLang clears the request's receiver."""
        self.path.gone(room, self.receivers[name])

    def offer(self, room: int, pages: int = 8) -> Operation:
        """The prefill engine offers ``pages``; returns the prefetch that the scheduler starts for it."""
        self.make_offer(room, pages)
        self.path.tick()
        (operation,) = self.tree.ongoing.values()
        return operation

    def make_offer(self, room: int, pages: int = 8) -> None:
        planes = tuple(Plane(*plane) for plane in self.pool.pages.planes)
        self.hear(
            Offer(
                room=room,
                attempt=0,
                first_page=0,
                end_page=pages,
                storage_end_page=pages,
                end_hash=f"page {pages - 1}",
                target=Target(session=PREFILL, planes=planes, slots=64),
                lease_s=CONFIG.lease_s,
                chunk_pages=3,
                limit_pages=None,
                engine=PREFILL,
            )
        )

    def hear(self, message: Message) -> None:
        self.reads.handle(PREFILL, message)

    @property
    def claims(self) -> list[Claim]:
        return [message for message in self.said if isinstance(message, Claim)]

    def serve(self, room: int, first_page: int, pages: int) -> None:
        """Grant the oldest claim ``pages`` pages, which are read and pushed at once, and refuse the others for good."""
        others = list(self.reads.reads[room].requested)[1:]
        self._grant(room, first_page, pages)
        for other in others:
            self.hear(Refuse(room, 0, other, "met", False))
        self._carry(pages)

    def bring(self, room: int, first_page: int, pages: int) -> None:
        """The same, but the others stay unanswered."""
        self._grant(room, first_page, pages)
        self._carry(pages)

    def _grant(self, room: int, first_page: int, pages: int) -> None:
        oldest = next(iter(self.reads.reads[room].requested))
        self.hear(Grant(room, 0, oldest, oldest, first_page, tuple(range(pages)), False, CONFIG.lease_s))

    def _carry(self, pages: int) -> None:
        chunk = self.reads.carriage.next_chunk(0)
        assert chunk is not None
        self.reads.carriage.was_read(chunk, pages, 0.001)
        self.reads.carriage.pushed(chunk, None)

    def end_transfer(self, operation: Operation, got: int) -> None:
        """The end of the transfer on SGLang's IO thread, and what the scheduler then does with it."""
        self.path.transfer_over(operation)
        if self.tree.ongoing.pop(operation.handle, None) is not None:
            self.tree.host_pages = operation.storage_start // PAGE_TOKENS + got
            self.path.inserted(operation.handle)
