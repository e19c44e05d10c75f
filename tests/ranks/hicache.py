"""One rank's HiCache, made small: what SGLang's tree and controller do to a prefetch, with its reductions over ranks.

A prefetch goes through the threads that SGLang has for it: hit query (reduced to the least over the ranks, in the order
of submission), the scheduler (which allocates host pages), transfer (a batch of pages after the other, and the end of
it), reduction of each batch's count, the scheduler again (which inserts). Each step that SGLang's ranks take in step is
noted in ``trace``, which must be the same on all ranks in the end.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from sglang_dualpath.hicache.decode import DualPathDecodeTree
from tests.ranks.lockstep import Diverged, Lockstep
from tests.reader.host import PAGE_TOKENS, Slots, Storage

BATCH_PAGES = 4
ROOT = "root"

Node = Any
"""The root, or (prompt, pages): a prompt of which so many leading pages are in host memory."""


@dataclass(eq=False)
class Operation:
    """A prefetch of one prompt's pages."""

    handle: str
    prompt: int
    storage_start: int
    hash_value: list[str]
    stored: bool
    """Known to be in storage: no hit query."""
    host_indices: torch.Tensor | None = None
    completed: int = 0
    released: int = 0
    terminated: bool = False

    def is_terminated(self) -> bool:
        return self.terminated


class Channels:
    """What SGLang's threads of one server's ranks reduce over."""

    def __init__(self, size: int) -> None:
        self.scheduler, self.query, self.sync = Lockstep(size), Lockstep(size), Lockstep(size)

    def end(self) -> None:
        for group in (self.scheduler, self.query, self.sync):
            group.end()


class HiCache:
    """Tree and controller of one rank.

    ``suffix`` is what a storage backend adds to a page's key: the rank's number where each rank has heads of its own,
    nothing where all hold the same.
    """

    prefetch_threshold = PAGE_TOKENS
    hicache_storage_pass_prefix_keys = False

    def __init__(self, rank: int, channels: Channels, pool: Slots, storage: Storage, suffix: str, writer: str) -> None:
        self.rank = rank
        self.pool = pool
        self.trace: list[tuple[object, ...]] = []
        self.errors: list[BaseException] = []
        self.ongoing: dict[str, Operation] = {}
        self.host: dict[int, list[int]] = {}
        """Host slots of the leading pages of each prompt."""
        self.locks: Counter[int] = Counter()
        self.path: Any = None
        self.revoked: Callable[[str], None] = lambda handle: None
        self.inserted: Callable[[str], None] = lambda handle: None
        self.storage_stop_event = threading.Event()
        self.storage_backend = None
        self.ongoing_write_through: dict[object, Any] = {}
        self.tree_core = SimpleNamespace(
            collect_path_info=lambda nodes: [[SimpleNamespace(node_id=node) for node in nodes]],
            build_storage_backup_spec=self._backup_spec,
        )
        self._channels = channels
        self._storage = storage
        self._suffix = suffix
        self._writer = writer
        self._queries: queue.Queue[Operation] = queue.Queue()
        self._hits: queue.Queue[Operation] = queue.Queue()
        self._transfers: queue.Queue[Operation] = queue.Queue()
        self._syncs: queue.Queue[tuple[Operation, int | None]] = queue.Queue()
        self._acks: queue.Queue[tuple[Operation, int | None]] = queue.Queue()
        self._threads = [
            threading.Thread(target=self._loop, args=(source, step), daemon=True, name=f"{writer}-{name}")
            for name, source, step in (
                ("query", self._queries, self._query),
                ("transfer", self._transfers, self._transfer),
                ("sync", self._syncs, self._sync),
            )
        ]
        for thread in self._threads:
            thread.start()

    # -- SGLang's threads ----------------------------------------------------------------------------------------------

    def _loop(self, source: queue.Queue[Any], step: Callable[[Any], None]) -> None:
        while not self.storage_stop_event.is_set():
            try:
                item = source.get(timeout=0.05)
            except queue.Empty:
                continue
            try:
                step(item)
            except BaseException as fault:
                if not self.storage_stop_event.is_set():
                    self.errors.append(fault)
                    return

    def _query(self, operation: Operation) -> None:
        known = [f"{page_hash}{self._suffix}" in self._storage.pages for page_hash in operation.hash_value]
        hits = len(known) if operation.stored else [*known, False].index(False)
        hits = self._channels.query.least(self.rank, ("query", operation.handle), hits)
        operation.hash_value = operation.hash_value[:hits]
        self._hits.put(operation)

    def _transfer(self, operation: Operation) -> None:
        done, good = 0, True
        pages = operation.hash_value
        for first in range(0, len(pages), BATCH_PAGES):
            if good and not operation.terminated:
                batch = pages[first : first + BATCH_PAGES]
                got = self.path.page_get(operation, batch)
                done += got
                good = got == len(batch)
            self._syncs.put((operation, done))
        self.path.transfer_over(operation)
        self._syncs.put((operation, None))

    def _sync(self, ack: tuple[Operation, int | None]) -> None:
        operation, done = ack
        if done is not None:
            done = self._channels.sync.least(self.rank, ("sync", operation.handle), done)
        self._acks.put((operation, done))

    # -- scheduler thread ----------------------------------------------------------------------------------------------

    def submit(self, operation: Operation) -> None:
        self.trace.append(("submit", operation.handle, operation.storage_start, len(operation.hash_value)))
        self.ongoing[operation.handle] = operation
        self._queries.put(operation)

    def events(self, ranks: Any) -> None:
        """What has come back from the threads of all ranks."""
        hits, acks = ranks.least([self._hits.qsize(), self._acks.qsize()])
        for _ in range(hits):
            self._allocate(self._hits.get())
        for _ in range(acks):
            self._acknowledge(*self._acks.get())

    def _allocate(self, operation: Operation) -> None:
        if self.ongoing.get(operation.handle) is not operation:
            return
        pages = len(operation.hash_value)
        self.trace.append(("hit", operation.handle, pages, self.pool.free_count))
        if not 0 < pages <= self.pool.free_count:
            del self.ongoing[operation.handle]
            self.revoked(operation.handle)
            return
        operation.host_indices = self.pool.pages.indices(self.pool.alloc(pages))
        self._transfers.put(operation)

    def _acknowledge(self, operation: Operation, done: int | None) -> None:
        current = self.ongoing.get(operation.handle) is operation
        if done is not None:
            if current:
                operation.completed = done
            return
        assert operation.host_indices is not None
        slots = self.pool.pages.slots_of(operation.host_indices)
        if not current:
            self.pool.free(slots[operation.released :])
            return
        del self.ongoing[operation.handle]
        self._insert(operation, slots)
        self.inserted(operation.handle)

    def _insert(self, operation: Operation, slots: list[int]) -> None:
        first, done = operation.storage_start // PAGE_TOKENS, operation.completed
        held = self.host.setdefault(operation.prompt, [])
        # Another request may have brought the same pages, or the ones before may be gone.
        new = slots[len(held) - first : done] if first <= len(held) else []
        self.pool.seal(new)
        held += new
        self.pool.free([slot for slot in slots if slot not in new])
        self.trace.append(("insert", operation.handle, done, len(held), self.pool.free_count))

    def abort(self, handle: str) -> None:
        operation = self.ongoing.pop(handle, None)
        if operation is None:
            return
        self.trace.append(("abort", handle, operation.completed))
        operation.terminated = True
        if operation.host_indices is not None:
            operation.released = operation.completed
            self.pool.free(self.pool.pages.slots_of(operation.host_indices)[: operation.released])

    def evict(self, prompt: int) -> None:
        if not self.locks[prompt] and prompt in self.host:
            self.pool.free(self.host.pop(prompt))
            self.trace.append(("evict", prompt, self.pool.free_count))

    def stop(self) -> None:
        self.storage_stop_event.set()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(10)
            if thread.is_alive():
                raise Diverged(f"{thread.name} does not end")

    def read_pages(self, operation: Operation, first: int, indices: torch.Tensor) -> int:
        slots = self.pool.pages.slots_of(indices)
        hashes = [f"{one}{self._suffix}" for one in operation.hash_value[first : first + len(slots)]]
        return self._storage.read(hashes, self.pool, slots, f"reader of {self._writer}")

    # -- tree, as the decode path sees it ------------------------------------------------------------------------------

    lock_host = DualPathDecodeTree.lock_host
    unlock_host = DualPathDecodeTree.unlock_host

    def swa_reprefill_tail_tokens(self, req: Any) -> int:
        return 0

    def match_prefix(self, params: Any) -> Any:
        prompt = params.key.token_ids[0]
        pages = min(len(self.host.get(prompt, ())), len(params.key.token_ids) // PAGE_TOKENS)
        self.trace.append(("match", prompt, pages))
        node = (prompt, pages) if pages else ROOT
        return SimpleNamespace(device_prefix_len=0, host_hit_length=pages * PAGE_TOKENS, last_host_node=node)

    def _backup_spec(self, node: Node, force: bool) -> Any:
        prompt, pages = node
        host_value = self.pool.pages.indices(self.host[prompt][:pages])
        return SimpleNamespace(host_value=host_value, hash_value=page_hashes(prompt, 0, pages))

    def is_root(self, node: Node) -> bool:
        return bool(node == ROOT)

    def is_backuped(self, node: Node) -> bool:
        return not self.is_root(node)

    def get_last_hash_value(self, node: Node) -> None:
        return None

    def inc_host_lock_ref(self, node: Node) -> Any:
        self.locks[node[0]] += 1
        self.trace.append(("lock", node, self.locks[node[0]]))
        return SimpleNamespace(to_dec_params=lambda: node)

    def dec_host_lock_ref(self, node: Node, receipt: Any) -> None:
        assert receipt == node
        self.locks[node[0]] -= 1
        assert self.locks[node[0]] >= 0, "unlocked twice"
        self.trace.append(("unlock", node, self.locks[node[0]]))

    def prefetch_from_storage(
        self,
        handle: str,
        anchor: Node,
        tokens: Sequence[int],
        *args: Any,
        matched_prefix_tokens: Sequence[int],
        storage_hit_end: int,
        **kwargs: Any,
    ) -> None:
        start, end = len(matched_prefix_tokens), storage_hit_end // PAGE_TOKENS
        prompt = tokens[0]
        self.submit(Operation(handle, prompt, start, page_hashes(prompt, start // PAGE_TOKENS, end), stored=True))

    def has_ongoing_prefetch(self, handle: str) -> bool:
        return handle in self.ongoing

    def pop_prefetch_loaded_tokens(self, handle: str) -> int:
        return 0

    def finish(self, handle: str, outcome: Any) -> None:
        self.abort(handle)


def page_hashes(prompt: int, first: int, end: int) -> list[str]:
    return [f"p{prompt}:{page}" for page in range(first, end)]
