"""SGLang's host pool seen as numbered pages ("slots") with addresses, which is all that a hop needs of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sglang_dualpath.errors import UnsupportedError
from sglang_dualpath.transfer import PlaneGeometry, PoolGeometry


class HostPages:
    """The pages of one rank's host pool.

    Args:
        pool: SGLang's ``HostKVCache`` of the primary KV pool, in a layout whose pages are contiguous.
        page_tokens: tokens in a page, SGLang's ``--page-size``.

    Raises:
        UnsupportedError: pages are not at regular addresses (a layer-first layout has ``2 x layers`` pieces a page).
    """

    def __init__(self, pool: Any, page_tokens: int) -> None:
        self._pool = pool
        self.page_tokens = page_tokens
        self.slots = int(pool.size) // page_tokens
        if self.slots < 2:
            raise UnsupportedError(
                f"the host pool holds {self.slots} page(s); give it more with --hicache-size or --hicache-ratio"
            )
        self.planes = self._measure()
        self.geometry = PoolGeometry(self.planes, self.slots)
        self.page_bytes = sum(plane.page_bytes for plane in self.planes)

    def _measure(self) -> tuple[PlaneGeometry, ...]:
        last = self.slots - 1
        probe = torch.cat([self.indices([slot]) for slot in (0, 1, last)])
        addresses, sizes = self._pool.get_page_buffer_meta(probe)
        pieces = len(addresses) // 3
        if pieces > 8:
            raise UnsupportedError(
                f"the host pool layout has {pieces} pieces a page; use --hicache-mem-layout page_first or "
                "page_first_direct, whose pages are contiguous"
            )
        planes = []
        for piece in range(pieces):
            first, second, end = (addresses[piece + pieces * which] for which in range(3))
            stride = second - first
            if stride < sizes[piece] or end != first + last * stride:
                raise UnsupportedError("the host pool's pages are not at regular addresses in this layout")
            planes.append(PlaneGeometry(first, stride, sizes[piece]))
        return tuple(planes)

    def indices(self, slots: Sequence[int]) -> torch.Tensor:
        """Token indices of ``slots``, as SGLang counts them: int64, shape ``(len(slots) * page_tokens,)``."""
        starts = torch.tensor(slots, dtype=torch.int64) * self.page_tokens
        return (starts[:, None] + torch.arange(self.page_tokens, dtype=torch.int64)).reshape(-1)

    def slots_of(self, indices: torch.Tensor) -> list[int]:
        """Slot numbers of page-aligned token ``indices`` (int64, a multiple of ``page_tokens`` long)."""
        return [int(start) // self.page_tokens for start in indices[:: self.page_tokens].tolist()]
