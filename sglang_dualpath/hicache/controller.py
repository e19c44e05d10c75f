"""SGLang's HiCache controller, with its page getter, page setter and hit query handed to the read path in charge."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

from sglang_dualpath.compat import native

# Looked at once: SGLang does not change while it runs.
_STORE_IS_TOLD = native.has(native.STORAGE_REQUEST_HANDLE)

PageGetter = Callable[[Any, Sequence[str], torch.Tensor, Any], int]
PageSetter = Callable[[Sequence[str], torch.Tensor, Any], bool]


class StoragePath(Protocol):
    """What a read path does in the controller's place. Called on the controller's own threads."""

    def page_get(self, operation: Any, hashes: Sequence[str]) -> int:
        """Bring the operation's next ``len(hashes)`` pages into its host pages; return how many leading ones are."""

    def transfer_over(self, operation: Any) -> None:
        """No more pages of this operation are asked for, and SGLang is about to insert or free its host pages."""

    def extend_hit(self, handle: Any, hashes: Sequence[str], stored: int) -> int:
        """How many leading pages of these a request can have, of which storage has ``stored``: as many or more."""

    def unwritten(self, hashes: Sequence[str]) -> list[int]:
        """Which of these pages should be written back to storage, by position."""

    def written_back(self, pages: int) -> None:
        """So many pages were handed to storage."""


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

    def read_pages(self, operation: Any, first: int, indices: torch.Tensor) -> int:
        """Read the operation's pages from index ``first`` on out of storage into token ``indices``; any thread.

        Returns the count of leading good pages. Reads come out of order, so the prefix keys are those of ``first``.
        """
        count = len(indices) // self.page_size
        hashes = operation.hash_value[first : first + count]
        prefix = operation.prefix_keys
        if prefix is not None:
            prefix = prefix + operation.hash_value[:first]
        extra_info = HiCacheStorageExtraInfo(prefix_keys=prefix)
        if _STORE_IS_TOLD:
            extra_info.handle = operation.handle
        return self._stock_page_get(operation, hashes, indices, extra_info)

    def _get_pages(self, operation: Any, hashes: Sequence[str], indices: torch.Tensor, extra_info: Any = None) -> int:
        if self._dualpath is None:
            return self._stock_page_get(operation, hashes, indices, extra_info)
        return self._dualpath.page_get(operation, hashes)

    def _set_pages(self, hashes: Sequence[str], indices: torch.Tensor, extra_info: Any = None) -> bool:
        if self._dualpath is None:
            return self._stock_page_set(hashes, indices, extra_info)
        wanted = self._dualpath.unwritten(hashes)
        if not wanted:
            return True
        if len(wanted) < len(hashes):
            pages = indices.reshape(len(hashes), self.page_size)
            indices = pages[torch.tensor(wanted)].reshape(-1)
            hashes = [hashes[which] for which in wanted]
        good = self._stock_page_set(hashes, indices, extra_info)
        if good:
            self._dualpath.written_back(len(hashes))
        return good

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
