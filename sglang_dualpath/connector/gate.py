"""Where a receiver asks whether its request's read has settled."""

from __future__ import annotations

from typing import Protocol


class Gate(Protocol):
    """Holds back the bootstrap of requests whose read is going on."""

    def pending(self, room: int) -> bool:
        """True while the bootstrap of ``room`` must wait."""

    def located(self, room: int, receiver: object, dp_rank: int) -> None:
        """SGLang has found out which data-parallel rank of the prefill server has the request. Scheduler thread."""

    def gone(self, room: int, receiver: object) -> None:
        """A ``receiver`` of ``room`` was cleared: its request is gone or has been sent all. Samples share a room.

        Scheduler thread.
        """


class OpenGate:
    """Holds back nothing: a decode engine without reads."""

    def pending(self, room: int) -> bool:
        return False

    def located(self, room: int, receiver: object, dp_rank: int) -> None:
        return None

    def gone(self, room: int, receiver: object) -> None:
        return None
