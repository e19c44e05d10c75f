"""A transport between objects of one process, so that everything above it runs in tests without an engine."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import ClassVar

from sglang_dualpath.errors import NotPushedError, TransferError
from sglang_dualpath.transfer.base import Peer, PoolGeometry, push_plan


class MemoryTransport:
    """Copies with ``memmove`` into the pool that the peer object registered, and nowhere else."""

    drain_s = 0.0
    metadata = b""

    _peers: ClassVar[dict[str, MemoryTransport]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, session: str) -> None:
        self._session = session
        self._pool = PoolGeometry((), 0)
        with self._lock:
            if session in self._peers:
                raise TransferError(f"session {session!r} is already open in this process")
            self._peers[session] = self

    @property
    def session(self) -> str:
        return self._session

    def register(self, pool: PoolGeometry) -> None:
        self._pool = pool
        with self._lock:
            self._peers[self._session] = self

    def push(self, peer: Peer, source_slots: Sequence[int], target_slots: Sequence[int]) -> None:
        plan = push_plan(self._pool, source_slots, peer.pool, target_slots)
        with self._lock:
            target = self._peers.get(peer.session)
        if target is None:
            raise NotPushedError(f"no peer has the session {peer.session!r}")
        for one in plan:
            if not target._holds(one.destination, one.length):
                raise TransferError(
                    f"{one.length} bytes at {one.destination:#x} are not registered by {peer.session!r}"
                )
            ctypes.memmove(one.destination, one.source, one.length)

    def _holds(self, address: int, length: int) -> bool:
        return any(base <= address and address + length <= base + size for base, size in self._pool.regions())

    def close(self) -> None:
        with self._lock:
            self._peers.pop(self._session, None)
