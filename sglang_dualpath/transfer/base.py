"""What the hop needs of a transfer engine, and no more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol


class Descriptor(NamedTuple):
    """One contiguous copy: ``length`` bytes from local address ``source`` to the peer's address ``destination``."""

    source: int
    destination: int
    length: int


class Transport(Protocol):
    """One-sided writes from this process's registered memory into a peer's.

    ``push`` blocks the calling thread, releases the GIL while it waits, and returns only when the engine reports
    every byte delivered; it may be called from several threads at once.
    """

    @property
    def session(self) -> str:
        """The name under which peers address this process's registered memory."""

    @property
    def drain_s(self) -> float:
        """Seconds after a failed push in which bytes of it may still arrive."""

    def register(self, regions: Sequence[tuple[int, int]]) -> None:
        """Make ``(address, length in bytes)`` regions readable and writable by the engine.

        Raises :class:`~sglang_dualpath.errors.TransferError` when the engine refuses one.
        """

    def push(self, session: str, descriptors: Sequence[Descriptor]) -> None:
        """Write all descriptors into the memory of ``session``.

        Raises :class:`~sglang_dualpath.errors.TransferError` when any of it did not arrive; what arrived then is
        unknown, and more may for :attr:`drain_s`.
        """

    def close(self) -> None:
        """Undo ``register``. Idempotent."""


def coalesce(descriptors: Iterable[Descriptor]) -> list[Descriptor]:
    """Join neighbours that are contiguous on both sides.

    Engines pay per descriptor, and pages that SGLang allocated together lie together, so a chunk of many pages
    often becomes one descriptor per plane. The order of the input is kept, except that descriptors of the same plane
    should come one after the other for neighbours to meet.
    """
    joined: list[Descriptor] = []
    for one in descriptors:
        if joined:
            last = joined[-1]
            if last.source + last.length == one.source and last.destination + last.length == one.destination:
                joined[-1] = Descriptor(last.source, last.destination, last.length + one.length)
                continue
        joined.append(one)
    return joined
