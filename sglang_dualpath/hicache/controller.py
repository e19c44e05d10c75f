"""SGLang's HiCache controller, with its page getter, page setter and hit query handed to the read path in charge."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from sglang.srt.mem_cache.hicache_storage import STORAGE_BATCH_SIZE, HiCacheStorageExtraInfo
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

from sglang_dualpath.compat import native

# Looked at once: SGLang does not change while it runs.
_STORE_IS_TOLD = native.has(native.STORAGE_REQUEST_HANDLE)

PageGetter = Callable[[Any, Sequence[str], torch.Tensor, Any], int]
PageSetter = Callable[[Sequence[str], torch.Tensor, Any], bool]


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Runs ``first .. end`` of neighbours, of positions in order."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs


class StoragePath(Protocol):
    """What a read path does in the controller's place. Called on the controller's own threads."""

    def page_get(self, operation: Any, hashes: Sequence[str]) -> int:
        """Bring the operation's next ``len(hashes)`` pages into its host pages; return how many leading ones are."""

    def transfer_over(self, operation: Any) -> None:
        """No more pages of this operation are asked for, and SGLang is about to insert or free its host pages."""

    def extend_hit(self, handle: Any, hashes: Sequence[str], stored: int) -> int:
        """How many leading pages of these a request can have, of which storage has ``stored``: as many or more."""

    def unwritten(self, hashes: Sequence[str], prefix: Sequence[str] | None) -> list[int]:
        """Which of these pages should be written back to storage, by position.

        ``prefix``: hashes of the pages before them, where the store wants to be told.
        """

    def written_back(self, pages: int) -> None:
        """So many pages were handed to storage."""

    def waits_for_room(self) -> bool:
        """A prefetch that finds host pages for a part of it alone is to be given none. On the scheduler thread."""


class DualPathCacheController(HybridCacheController):
    """Acts as stock until :meth:`use` names a read path."""

    _dualpath: StoragePath | None = None
    page_get_func: PageGetter
    page_set_func: PageSetter
    _stock_page_get: PageGetter
    _stock_page_set: PageSetter

    def use(self, path: StoragePath) -> None:
        """From now on ``path`` gets pages."""
        self._dualpath = path

    def attach_storage_backend(self, *args: Any, **kwargs: Any) -> None:
        super().attach_storage_backend(*args, **kwargs)
        # Set by upstream on every attach, so wrapped on every attach.
        self._stock_page_get = self.page_get_func
        self._stock_page_set = self.page_set_func
        self.page_get_func = self._get_pages
        self.page_set_func = self._set_pages
        if _STORE_IS_TOLD:
            self.storage_backend.batch_exists = functools.partial(self._hits, self.storage_backend.batch_exists)

    def allocate_storage_hit(
        self,
        operation: Any,
        hit_tokens: int,
        *,
        allow_partial: bool,
        evict_host: Callable[[int], int],
        **options: Any,
    ) -> tuple[torch.Tensor | None, int]:
        if allow_partial and self._dualpath is not None and self._dualpath.waits_for_room():
            allow_partial = False
            # Asked again and again until there is room: evicting all that it wants each time would empty the cache.
            evict_host = functools.partial(self._evict_missing, evict_host, hit_tokens)
        allocated: tuple[torch.Tensor | None, int] = super().allocate_storage_hit(
            operation, hit_tokens, allow_partial=allow_partial, evict_host=evict_host, **options
        )
        return allocated

    def _evict_missing(self, evict_host: Callable[[int], int], wanted: int, tokens: int) -> int:
        missing = wanted - self.mem_pool_host.available_size()
        # With room here, another of the model's pools is full, and only SGLang knows how much is missing there.
        return evict_host(missing if missing > 0 else tokens)

    def read_pages(self, operation: Any, first: int, indices: torch.Tensor) -> int:
        """Read the operation's pages from index ``first`` on out of storage into token ``indices``; any thread.

        Returns the count of leading good pages. Reads come out of order, so the prefix keys are those of ``first``.
        The store is asked for as many pages at a time as upstream asks for, since some can do no more.
        """
        count = len(indices) // self.page_size
        good = 0
        while good < count:
            wanted = min(STORAGE_BATCH_SIZE, count - good)
            part = indices[good * self.page_size : (good + wanted) * self.page_size]
            found = self._read_batch(operation, first + good, wanted, part)
            good += found
            if found < wanted:
                break
        return good

    def _read_batch(self, operation: Any, first: int, count: int, indices: torch.Tensor) -> int:
        prefix = operation.prefix_keys
        if prefix is not None:
            prefix = prefix + operation.hash_value[:first]
        extra_info = HiCacheStorageExtraInfo(prefix_keys=prefix)
        if _STORE_IS_TOLD:
            extra_info.handle = operation.handle
        return self._stock_page_get(operation, operation.hash_value[first : first + count], indices, extra_info)

    def _get_pages(self, operation: Any, hashes: Sequence[str], indices: torch.Tensor, extra_info: Any = None) -> int:
        if self._dualpath is None:
            return self._stock_page_get(operation, hashes, indices, extra_info)
        return self._dualpath.page_get(operation, hashes)

    def _set_pages(self, hashes: Sequence[str], indices: torch.Tensor, extra_info: Any = None) -> bool:
        if self._dualpath is None:
            return self._stock_page_set(hashes, indices, extra_info)
        prefix = None if extra_info is None else extra_info.prefix_keys
        for first, end in _runs(self._dualpath.unwritten(hashes, prefix)):
            about = extra_info
            if prefix is not None:  # which must go on to be what comes right before the pages
                about = dataclasses.replace(extra_info, prefix_keys=[*prefix, *hashes[:first]])
            part = indices[first * self.page_size : end * self.page_size]
            if not self._stock_page_set(hashes[first:end], part, about):
                return False
            self._dualpath.written_back(end - first)
        return True

    def _page_transfer(self, operation: Any) -> Any:
        try:
            return super()._page_transfer(operation)
        finally:
            # Before the final ack, after which the host pages belong to the tree or to the pool.
            if self._dualpath is not None:
                self._dualpath.transfer_over(operation)

    def _hits(self, stored_hits: Callable[[list[str], Any], int], keys: list[str], extra_info: Any = None) -> int:
        """The store's hit query, for a store that is told whose it is."""
        stored = stored_hits(keys, extra_info)
        handle = getattr(extra_info, "handle", None)
        if self._dualpath is None or handle is None:
            return stored
        return self._dualpath.extend_hit(handle, keys, stored)


class HitQueryingCacheController(DualPathCacheController):
    """For an SGLang that does not tell a store whose hits it asks for."""

    def _storage_hit_query(self, operation: Any) -> tuple[list[str], int]:
        hashes, tokens = super()._storage_hit_query(operation)
        possible = operation.all_hash_values
        if self._dualpath is None or operation.assume_stored or operation.pool_transfers or not possible:
            return hashes, tokens
        reached = self._dualpath.extend_hit(operation.handle, possible, len(hashes))
        if reached > len(hashes):
            return list(possible[:reached]), reached * self.page_size
        return hashes, tokens


def controller_class() -> type[DualPathCacheController]:
    """The one for the installed SGLang."""
    return DualPathCacheController if _STORE_IS_TOLD else HitQueryingCacheController
