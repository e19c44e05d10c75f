"""What the tensor-parallel ranks of one server decide together, so that each does the same in the same iteration.

SGLang's ranks run one scheduler loop in step: trees, pools and queues change alike because each rank does the same to
them, and a rank that submits a prefetch, takes a host lock or allocates a page alone pairs its next collective with
another one of its peers. So whatever is decided by a clock, by a message or by what a thread has done is agreed first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Ranks(Protocol):
    """The ranks of one server. Each method is called by all of them, at the same point of the same iteration of the
    scheduler's loop, with equally many values; it blocks until they have, and gives all of them the same."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def least(self, values: Sequence[int]) -> list[int]:
        """Position by position the least value of all ranks."""

    def of_first(self, values: Sequence[int]) -> list[int]:
        """Rank 0's values, whatever the others passed."""


def agreed(ranks: Ranks, flag: bool) -> bool:
    """Whether it is so on every rank. A collective, as those of :class:`Ranks`."""
    return bool(ranks.least([flag])[0])


class SoleRank:
    """Tensor parallel 1: what this rank says, without a collective."""

    rank = 0
    size = 1

    def least(self, values: Sequence[int]) -> list[int]:
        return list(values)

    def of_first(self, values: Sequence[int]) -> list[int]:
        return list(values)


class GroupRanks:
    """Several ranks, over a CPU (gloo) group of SGLang's that its scheduler thread uses too.

    Values are int64. Nobody is asked for no values at all.
    """

    def __init__(self, group: Any, *, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._group = group

    def least(self, values: Sequence[int]) -> list[int]:
        if not values:
            return []
        tensor = torch.tensor(values, dtype=torch.int64)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MIN, group=self._group)
        return [int(value) for value in tensor.tolist()]

    def of_first(self, values: Sequence[int]) -> list[int]:
        if not values:
            return []
        tensor = torch.tensor(values, dtype=torch.int64)
        torch.distributed.broadcast(tensor, group=self._group, group_src=0)
        return [int(value) for value in tensor.tolist()]


def make_ranks(group: Any, *, rank: int, size: int) -> Ranks:
    """The ranks of a server whose scheduler is rank ``rank`` of ``size`` in ``group``."""
    return GroupRanks(group, rank=rank, size=size) if size > 1 else SoleRank()
