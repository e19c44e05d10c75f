"""The hop over the Mooncake transfer engine that SGLang's own PD transfer created in this process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sglang_dualpath.errors import TransferError
from sglang_dualpath.transfer.base import Peer, PoolGeometry, push_plan

# More descriptors in one call make the engine allocate per-slice state for all of them at once; a chunk never needs
# this many, so the cap only guards against a badly fragmented host pool.
_DESCRIPTORS_PER_CALL = 1024

# Mooncake's own setting and default: a batch is reported as failed after it, whatever its workers still have queued.
_TIMEOUT_ENV = "MC_TRANSFER_TIMEOUT"
_DEFAULT_TIMEOUT_S = 30.0


def _drain_s() -> float:
    """Slices queued at a time-out end within another one; RDMA retransmissions or TCP's last bytes do so sooner."""
    try:
        timeout_s = float(os.environ.get(_TIMEOUT_ENV, _DEFAULT_TIMEOUT_S))
    except ValueError:
        timeout_s = _DEFAULT_TIMEOUT_S
    return 2 * max(timeout_s, _DEFAULT_TIMEOUT_S)


class MooncakeTransport:
    """Pushes through an engine with SGLang's ``MooncakeTransferEngine`` interface.

    A session's name is all that a peer must know: engines ask each other for the rest.

    Args:
        engine: has ``get_session_id()``, ``register(ptr, length)``, ``deregister(ptr)`` and
            ``batch_transfer_sync(session, sources, destinations, lengths)`` (negative on failure, GIL released).
        registered: somebody else has registered the host pool with this engine, which refuses to do it twice.
    """

    metadata = b""

    def __init__(self, engine: Any, *, registered: bool = False) -> None:
        self.drain_s = _drain_s()
        self._engine = engine
        self._pool = PoolGeometry((), 0)
        self._is_registered = registered
        self._registered: list[int] = []

    @property
    def session(self) -> str:
        return str(self._engine.get_session_id())

    def register(self, pool: PoolGeometry) -> None:
        for address, length in () if self._is_registered else pool.regions():
            try:
                self._engine.register(address, length)
            except RuntimeError as error:
                raise TransferError(
                    f"Mooncake could not register {length} bytes of the host pool ({error}); check the memlock limit"
                ) from error
            self._registered.append(address)
        self._pool = pool

    def push(self, peer: Peer, source_slots: Sequence[int], target_slots: Sequence[int]) -> None:
        plan = push_plan(self._pool, source_slots, peer.pool, target_slots)
        for start in range(0, len(plan), _DESCRIPTORS_PER_CALL):
            part = plan[start : start + _DESCRIPTORS_PER_CALL]
            status = self._engine.batch_transfer_sync(
                peer.session,
                [one.source for one in part],
                [one.destination for one in part],
                [one.length for one in part],
            )
            if status < 0:
                raise TransferError(f"Mooncake reported {status} for a push to {peer.session}")

    def close(self) -> None:
        for address in self._registered:
            self._engine.deregister(address)
        self._registered.clear()
