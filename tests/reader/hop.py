"""A transport into watched pools, whose pushes can be slowed, stopped half-way and broken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from sglang_dualpath.errors import TransferError
from sglang_dualpath.transfer import Descriptor, Peer, PoolGeometry, push_plan
from tests.reader.host import PLANE_BYTES, Slots


def introduction(session: str) -> bytes:
    """What a transfer engine must know of the peer of this name."""
    return f"metadata of {session}".encode()


class Hop:
    """Each write is checked when it happens. ``gate`` closed: pushes hang half done."""

    drain_s = 0.0

    def __init__(self, session: str, pool: Slots, sessions: dict[str, Slots]) -> None:
        self.session = session
        self.metadata = introduction(session)
        self.gate = threading.Event()
        self.gate.set()
        self.latency_s = 0.0
        self.fault: Callable[[str], None] = lambda session: None
        self.late_write_s: float | None = None
        self.over: Callable[[], bool] = lambda: True
        self.strangers: list[Peer] = []
        """Peers that were pushed to without knowing what they say of themselves."""
        self.pushes = 0
        self.in_flight = 0
        self.written: set[tuple[str, int]] = set()
        self.dead = False
        self._pool = pool
        self._sessions = sessions
        sessions[session] = pool

    def at_push(self, number: int, do: Callable[[], None]) -> None:
        """Call ``do`` in the push of this number, before it writes, however late the test's own thread is."""
        self.fault = lambda session: do() if self.pushes == number else None

    def register(self, pool: PoolGeometry) -> None:
        pass

    def push(self, peer: Peer, source_slots: Sequence[int], target_slots: Sequence[int]) -> None:
        session = peer.session
        if peer.metadata != introduction(session):
            self.strangers.append(peer)
        descriptors = push_plan(self._pool.pages.geometry, source_slots, peer.pool, target_slots)
        self.in_flight += 1
        self.pushes += 1
        try:
            if self.late_write_s is not None:
                # A transfer engine that reports a time-out while its worker still has the data queued.
                timer = threading.Timer(self.late_write_s, self._write, (session, descriptors))
                timer.daemon = True
                timer.start()
                raise TransferError("timed out", over=self.over)
            time.sleep(self.latency_s)
            self.fault(session)
            self._write(session, descriptors[: len(descriptors) // 2])
            self.gate.wait(30)
            if self.dead:
                raise TransferError("dead")
            self._write(session, descriptors[len(descriptors) // 2 :])
        finally:
            self.in_flight -= 1

    def _write(self, session: str, descriptors: Sequence[Descriptor]) -> None:
        target = self._sessions[session]
        for one in descriptors:
            plane, slot = target.find(one.destination)
            from_plane, from_slot = self._pool.find(one.source)
            assert plane == from_plane
            for page in range(one.length // PLANE_BYTES[plane]):
                data = self._pool.planes[plane][from_slot + page].numpy().tobytes()
                target.write(slot + page, plane, data, f"push of {self.session}")
                self.written.add((session, slot + page))

    def close(self) -> None:
        pass
