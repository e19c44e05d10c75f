"""Which combinations of store, router, model, transfer backend and tensor parallel the end-to-end tests run.

`COVER` has every pair of values of any two factors at least once, but for stores with tensor parallel, which do not
know of each other: two rows of two ranks each are what CI has time for. `DUALPATH_TEST_ALL=1` (``make test-all``) runs
the full cross instead.
"""

from __future__ import annotations

import itertools
import os
from typing import Literal, NamedTuple

Store = Literal["mooncake", "file", "nixl", "dynamic"]
Router = Literal["gateway", "mini_lb"]
Model = Literal["gqa", "mla"]
Transfer = Literal["mooncake", "nixl"]
Ranks = Literal["tp1", "tp2"]

STORES: tuple[Store, ...] = ("mooncake", "file", "nixl", "dynamic")
ROUTERS: tuple[Router, ...] = ("gateway", "mini_lb")
MODELS: tuple[Model, ...] = ("gqa", "mla")
TRANSFERS: tuple[Transfer, ...] = ("mooncake", "nixl")
RANKS: tuple[Ranks, ...] = ("tp1", "tp2")


class Row(NamedTuple):
    """One cluster that is started."""

    store: Store
    router: Router
    model: Model
    transfer: Transfer
    ranks: Ranks

    def __str__(self) -> str:
        return "-".join(self)

    @property
    def tp_size(self) -> int:
        """Tensor parallel of both servers."""
        return int(self.ranks.removeprefix("tp"))


COVER = (
    Row("mooncake", "gateway", "gqa", "mooncake", "tp1"),
    Row("mooncake", "mini_lb", "mla", "nixl", "tp2"),
    Row("file", "gateway", "gqa", "mooncake", "tp2"),
    Row("file", "mini_lb", "mla", "nixl", "tp1"),
    Row("nixl", "gateway", "gqa", "nixl", "tp1"),
    Row("nixl", "mini_lb", "mla", "mooncake", "tp1"),
    Row("dynamic", "gateway", "mla", "mooncake", "tp1"),
    Row("dynamic", "mini_lb", "gqa", "nixl", "tp1"),
)
APART = ("store", "ranks")
"""The one pair of factors whose values need not all meet."""
FULL = tuple(Row(*values) for values in itertools.product(STORES, ROUTERS, MODELS, TRANSFERS, RANKS))


def rows() -> tuple[Row, ...]:
    """The rows of this run, those with one reference together, because its outputs are made once."""
    chosen = FULL if os.environ.get("DUALPATH_TEST_ALL") else COVER
    return tuple(sorted(chosen, key=lambda row: (row.model, row.ranks)))
