"""The hop over the Mooncake transfer engine that SGLang's own PD transfer created in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang_dualpath.errors import TransferError
from sglang_dualpath.transfer.base import Descriptor

# More descriptors in one call make the engine allocate per-slice state for all of them at once; a chunk never needs
# this many, so the cap only guards against a badly fragmented host pool.
_DESCRIPTORS_PER_CALL = 1024

# Its workers may still have slices of a batch queued when it reports a time-out (30 s by default, MC_TRANSFER_TIMEOUT):
# these end within such a time, too, and RDMA retransmissions or a TCP connection's last bytes sooner.
_DRAIN_S = 60.0


class MooncakeTransport:
    """Pushes through an engine with SGLang's ``MooncakeTransferEngine`` interface.

    Args:
        engine: has ``get_session_id()``, ``register(ptr, length)``, ``deregister(ptr)`` and
            ``batch_transfer_sync(session, sources, destinations, lengths)`` (negative on failure, GIL released).
    """

    drain_s = _DRAIN_S

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._registered: list[int] = []

    @property
    def session(self) -> str:
        return str(self._engine.get_session_id())

    def register(self, regions: Sequence[tuple[int, int]]) -> None:
        for address, length in regions:
            try:
                self._engine.register(address, length)
            except RuntimeError as error:
                raise TransferError(
                    f"Mooncake could not register {length} bytes of the host pool ({error}); check the memlock limit"
                ) from error
            self._registered.append(address)

    def push(self, session: str, descriptors: Sequence[Descriptor]) -> None:
        for start in range(0, len(descriptors), _DESCRIPTORS_PER_CALL):
            part = descriptors[start : start + _DESCRIPTORS_PER_CALL]
            status = self._engine.batch_transfer_sync(
                session,
                [one.source for one in part],
                [one.destination for one in part],
                [one.length for one in part],
            )
            if status < 0:
                raise TransferError(f"Mooncake reported {status} for a push to {session}")

    def close(self) -> None:
        for address in self._registered:
            self._engine.deregister(address)
        self._registered.clear()
