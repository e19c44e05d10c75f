"""An end of a hop over a real transfer engine, in a process of its own or in the test's."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.micro.fabrics import fabric
from sglang_dualpath.errors import TransferError
from sglang_dualpath.transfer import MemoryTransport, Peer, PlaneGeometry, PoolGeometry

SLOTS = 12
PLANE_BYTES = (4096, 1536)
STRIDES = (4096, 2048)
"""The second plane has gaps between its pages: nothing may be written there."""
GAP = 0xEE


class End:
    """A host pool of two planes, registered with a transport.

    Args:
        kind: a transfer engine, or "memory" for the in-process transport.
        scale: pages are so many times as large.
        deadline_s: of NIXL's transport.
    """

    def __init__(self, kind: str, scale: int = 1, deadline_s: float | None = None) -> None:
        self.scale = scale
        self._strides = [stride * scale for stride in STRIDES]
        self._sizes = [size * scale for size in PLANE_BYTES]
        self._planes = [np.full(SLOTS * stride, GAP, dtype=np.uint8) for stride in self._strides]
        planes = tuple(
            PlaneGeometry(plane.ctypes.data, stride, size)
            for plane, stride, size in zip(self._planes, self._strides, self._sizes, strict=True)
        )
        self.pool = PoolGeometry(planes, SLOTS)
        memory = kind == "memory"
        self.transport: Any = MemoryTransport(f"end-{id(self)}") if memory else fabric(kind)("127.0.0.1").transport
        if deadline_s is not None:
            self.transport._deadline_s = deadline_s
        self.transport.register(self.pool)
        self.errors: list[TransferError] = []
        self.fill(os.getpid() if kind != "memory" else id(self) % 2**32)  # not what its peer holds

    def peer(self) -> Peer:
        return Peer(self.transport.session, self.transport.metadata, self.pool)

    def pid(self) -> int:
        return os.getpid()

    def fill(self, seed: int) -> None:
        """Every page gets bytes of its own."""
        for number, plane in enumerate(self._planes):
            pages = plane.reshape(SLOTS, -1)[:, : self._sizes[number]]
            pages[:] = np.random.default_rng((seed, number)).integers(0, 256, pages.shape, dtype=np.uint8)

    def page(self, slot: int) -> bytes:
        """The bytes of a page, all planes."""
        planes = zip(self._planes, self._sizes, strict=True)
        return b"".join(plane.reshape(SLOTS, -1)[slot, :size].tobytes() for plane, size in planes)

    def pages(self) -> list[bytes]:
        return [self.page(slot) for slot in range(SLOTS)]

    def gaps_are_untouched(self) -> bool:
        planes = zip(self._planes, self._sizes, strict=True)
        return all(bool((plane.reshape(SLOTS, -1)[:, size:] == GAP).all()) for plane, size in planes)

    def push(self, peer: Peer, source: Sequence[int], target: Sequence[int]) -> str | None:
        """What went wrong, or None."""
        try:
            self.transport.push(peer, source, target)
        except TransferError as error:
            self.errors.append(error)
            return str(error)
        return None

    def push_at_once(self, peer: Peer, pushes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[str | None]:
        """The same from a thread for each."""
        said: list[str | None] = ["not ended"] * len(pushes)

        def run(number: int) -> None:
            said[number] = self.push(peer, *pushes[number])

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(pushes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return said

    def pieces(self, peer: Peer, source: Sequence[int], target: Sequence[int]) -> int:
        """How many contiguous pieces NIXL made of a push. Needs an agent that keeps such figures."""
        from sglang_dualpath.transfer import nixl

        release, pieces = nixl._release, []

        def count(handle: Any) -> None:
            pieces.append(self.transport._agent.get_xfer_telemetry(handle).descCount)
            release(handle)

        nixl._release = count
        try:
            self.transport.push(peer, source, target)
        finally:
            nixl._release = release
        (number,) = pieces
        return int(number)

    def forget_last(self) -> None:
        """The push that failed last is no longer meant."""
        self.errors.pop()

    def over(self, within_s: float = 0.0) -> bool:
        """Whether the engine has ended the push that failed last."""
        until_s = time.monotonic() + within_s
        while not self.errors[-1].over():
            if time.monotonic() >= until_s:
                return False
            time.sleep(0.01)
        return True

    def again(self) -> Peer:
        """Give the memory up and register it once more."""
        self.transport.close()
        self.transport.register(self.pool)
        return self.peer()

    def close(self) -> None:
        self.transport.close()
        self.transport.close()
