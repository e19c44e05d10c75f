"""Host memory laid out as SGLang's `page_first_direct` pool of an MHA model, without SGLang."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import torch

from sglang_dualpath.reader.pool import HostPages

PAGE_TOKENS = 64
PLANES = 2  # keys and values
#: A page of the fixed setting: 64 tokens x 16 KiB.
PAGE_BYTES = 1 << 20


class PagePool:
    """`pages` pages of `page_bytes` in two planes, each plane's pages one after the other, as in SGLang's pool.

    There the buffer has the shape (2, pages, layers, page tokens, heads, width); what of a page is one contiguous piece
    here is (layers, page tokens, heads, width) of it.
    """

    def __init__(self, pages: int, page_bytes: int) -> None:
        self.size = pages * PAGE_TOKENS
        self.page_bytes = page_bytes
        self._planes = torch.zeros((PLANES, pages, page_bytes // PLANES), dtype=torch.uint8)
        self.pages = HostPages(self, PAGE_TOKENS)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """SGLang's interface: address and length of each page's pieces, for page-aligned token indices."""
        slots = [int(index) // PAGE_TOKENS for index in indices[::PAGE_TOKENS]]
        piece_bytes = self.page_bytes // PLANES
        addresses = [int(plane[slot].data_ptr()) for slot in slots for plane in self._planes]
        return addresses, [piece_bytes] * len(addresses)

    @property
    def address(self) -> int:
        """First byte of all pages."""
        return int(self._planes.data_ptr())

    @property
    def memory(self) -> memoryview:
        """All bytes, as one buffer."""
        return memoryview(self._planes.view(-1).numpy())

    def fill(self, seed: int) -> None:
        """Bytes that no other seed gives."""
        generator = torch.Generator().manual_seed(seed)
        self._planes.random_(0, 256, generator=generator)

    def clear(self) -> None:
        self._planes.zero_()

    def digest_bytes(self, size_bytes: int) -> str:
        """Digest of the first bytes of the memory, whatever pages they belong to."""
        return hashlib.blake2b(self.memory[:size_bytes], digest_size=16).hexdigest()

    def digest(self, slots: Sequence[int]) -> str:
        """Digest of these pages' bytes in this order."""
        found = hashlib.blake2b(digest_size=16)
        for slot in slots:
            for plane in self._planes:
                found.update(plane[slot].numpy())
        return found.hexdigest()


def scattered(pages: int) -> list[int]:
    """All slots in an order in which hardly any two neighbours lie together; the same each time."""
    slots = list(range(pages))
    random.Random(pages).shuffle(slots)
    return slots
