"""A host pool with real memory whose slots are watched, and a storage whose reads can be slowed, stopped and broken."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from sglang_dualpath.reader.pool import HostPages

PAGE_TOKENS = 4
PLANE_BYTES = (48, 16)
GARBAGE = 0xEE
WAIT_S = 15.0  # far above what a loaded machine needs; only failures wait that long


def wait_for(condition: Callable[[], object], what: str = "condition", within_s: float = WAIT_S) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline_s:
            pytest.fail(f"{what} did not come true within {within_s} s")
        time.sleep(0.002)


def prompt(name: str, pages: int) -> list[str]:
    return [f"{name}:{page}" for page in range(pages)]


def content(page_hash: str) -> tuple[bytes, ...]:
    """What storage holds for a page, one piece for each plane. No two pages are alike, and none is garbage."""
    return tuple(
        hashlib.blake2b(page_hash.encode(), digest_size=size, person=bytes([plane])).digest()
        for plane, size in enumerate(PLANE_BYTES)
    )


class Slots:
    """A host pool in SGLang's interface. Freed slots are overwritten, and a write into one is noted as a violation."""

    def __init__(self, slots: int) -> None:
        self.size = slots * PAGE_TOKENS
        self.planes = [torch.full((slots, size), GARBAGE, dtype=torch.uint8) for size in PLANE_BYTES]
        self.violations: list[str] = []
        self.lock = threading.RLock()
        self._free = list(range(slots))
        self._sealed: set[int] = set()
        self.pages = HostPages(self, PAGE_TOKENS)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        slots = [int(index) // PAGE_TOKENS for index in indices[::PAGE_TOKENS]]
        addresses = [
            plane.data_ptr() + slot * size
            for slot in slots
            for plane, size in zip(self.planes, PLANE_BYTES, strict=True)
        ]
        return addresses, list(PLANE_BYTES) * len(slots)

    @property
    def free_count(self) -> int:
        with self.lock:
            return len(self._free)

    def alloc(self, count: int) -> list[int]:
        with self.lock:
            assert count <= len(self._free), "the test's pool is too small"
            # Not in order, so that nothing passes only because pages lie side by side.
            taken, self._free = self._free[:count][::-1], self._free[count:]
            return taken

    def free(self, slots: Sequence[int]) -> None:
        with self.lock:
            assert not set(slots) & set(self._free), "freed twice"
            self._sealed -= set(slots)
            for plane in self.planes:
                plane[list(slots)] = GARBAGE
            self._free += slots

    def seal(self, slots: Sequence[int]) -> None:
        """These pages are in the tree now: nobody may write to them."""
        with self.lock:
            self._sealed |= set(slots)

    def write(self, slot: int, plane: int, data: bytes, writer: str) -> None:
        with self.lock:
            if slot in self._free or slot in self._sealed:
                self.violations.append(f"{writer} wrote to slot {slot}, {'free' if slot in self._free else 'in use'}")
            self.planes[plane][slot] = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())

    def read(self, slot: int) -> tuple[bytes, ...]:
        return tuple(plane[slot].numpy().tobytes() for plane in self.planes)

    def find(self, address: int) -> tuple[int, int]:
        """Plane and slot at an address."""
        for number, (plane, size) in enumerate(zip(self.planes, PLANE_BYTES, strict=True)):
            offset = address - plane.data_ptr()
            if 0 <= offset < plane.numel():
                assert offset % size == 0
                return number, offset // size
        raise AssertionError("an address outside the pool")


class Storage:
    """Pages by hash. ``gate`` closed: reads hang until it opens."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[bytes, ...]] = {}
        self.latency_s = 0.0
        self.fault: Callable[[Sequence[str]], None] = lambda hashes: None
        self.gate = threading.Event()
        self.gate.set()
        self.reads: Counter[str] = Counter()
        self.in_flight = 0
        self._lock = threading.Lock()

    def put(self, hashes: Sequence[str]) -> None:
        self.pages.update({page_hash: content(page_hash) for page_hash in hashes})

    def read(self, hashes: Sequence[str], pool: Slots, slots: Sequence[int], writer: str) -> int:
        """Read pages into ``slots``; returns how many leading ones there were. Raises what ``fault`` raises."""
        with self._lock:
            self.in_flight += 1
        try:
            time.sleep(self.latency_s)
            self.gate.wait(30)
            self.fault(hashes)
            for count, (page_hash, slot) in enumerate(zip(hashes, slots, strict=True)):
                pieces = self.pages.get(page_hash)
                if pieces is None:
                    return count
                for plane, data in enumerate(pieces):
                    pool.write(slot, plane, data, writer)
                with self._lock:
                    self.reads[page_hash] += 1
            return len(hashes)
        finally:
            with self._lock:
                self.in_flight -= 1
