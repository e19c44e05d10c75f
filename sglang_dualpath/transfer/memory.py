"""A transport between objects of one process, so that everything above it runs in tests without an engine."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import ClassVar

from sglang_dualpath.errors import TransferError
from sglang_dualpath.transfer.base import Descriptor


class MemoryTransport:
    """Copies with ``memmove`` into the regions that the peer object registered, and nowhere else."""

    drain_s = 0.0

    _peers: ClassVar[dict[str, MemoryTransport]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, session: str) -> None:
        self._session = session
        self._regions: list[tuple[int, int]] = []
        with self._lock:
            if session in self._peers:
                raise TransferError(f"session {session!r} is already open in this process")
            self._peers[session] = self

    @property
    def session(self) -> str:
        return self._session

    def register(self, regions: Sequence[tuple[int, int]]) -> None:
        self._regions.extend(regions)

    def push(self, session: str, descriptors: Sequence[Descriptor]) -> None:
        with self._lock:
            peer = self._peers.get(session)
        if peer is None:
            raise TransferError(f"no peer has the session {session!r}")
        for one in descriptors:
            if not peer._holds(one.destination, one.length):
                raise TransferError(f"{one.length} bytes at {one.destination:#x} are not registered by {session!r}")
            ctypes.memmove(one.destination, one.source, one.length)

    def _holds(self, address: int, length: int) -> bool:
        return any(base <= address and address + length <= base + size for base, size in self._regions)

    def close(self) -> None:
        with self._lock:
            self._peers.pop(self._session, None)
