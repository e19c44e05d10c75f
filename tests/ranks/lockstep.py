"""Collectives between threads, one per rank of a server, that complain when ranks call different ones."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence

WAIT_S = 20.0  # far above what a loaded machine needs; only a rank that never comes is waited for so long


class Diverged(AssertionError):
    """Ranks met in different collectives, or one did not come."""


class Lockstep:
    """One group of ``size`` ranks, as a process group of SGLang's is one: calls are matched by their order alone."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls = 0
        self._barrier = threading.Barrier(size)
        self._box: list[tuple[Hashable, object]] = [("nothing", None)] * size

    def exchange(self, rank: int, what: Hashable, value: object) -> list[object]:
        """The values of all ranks. Raises Diverged unless all of them called with the same ``what`` within the time."""
        self._box[rank] = (what, value)
        try:
            self._barrier.wait(WAIT_S)
            box = list(self._box)
            self._barrier.wait(WAIT_S)
        except threading.BrokenBarrierError:
            raise Diverged(f"rank {rank} waited alone in {what}") from None
        if len({one for one, _ in box}) != 1:
            raise Diverged(f"ranks met in {[one for one, _ in box]}")
        if rank == 0:
            self.calls += 1
        return [value for _, value in box]

    def least(self, rank: int, what: Hashable, value: int) -> int:
        return min(int(str(one)) for one in self.exchange(rank, what, value))

    def end(self) -> None:
        """Whoever waits, or ever will, is told that the group is no more."""
        self._barrier.abort()


class ThreadRanks:
    """``Ranks`` of one thread."""

    def __init__(self, group: Lockstep, rank: int) -> None:
        self.rank = rank
        self.size = group.size
        self._group = group

    def least(self, values: Sequence[int]) -> list[int]:
        every = self._group.exchange(self.rank, ("least", len(values)), [int(value) for value in values])
        return [min(column) for column in zip(*every, strict=True)]  # type: ignore[call-overload]

    def of_first(self, values: Sequence[int]) -> list[int]:
        every = self._group.exchange(self.rank, ("first", len(values)), [int(value) for value in values])
        return list(every[0])  # type: ignore[call-overload]
