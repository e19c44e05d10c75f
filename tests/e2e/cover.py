"""Which combinations of store, router, model, transfer backend and tensor parallel the end-to-end tests run.

`COVER` has every pair of values of any two factors at least once, but for stores with tensor parallel, which do not
know of each other: two rows of two ranks each are what CI has time for. `DUALPATH_TEST_CELLS=1` (``make test-cells``)
runs one row for each cell of README's table that `COVER` leaves out, `DUALPATH_TEST_ALL=1` (``make test-all``) the full
cross.
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


def cell(row: Row) -> tuple[Store, Model, Transfer, Ranks]:
    """The cell of README's table that a row is in: a router only passes requests on, and has none of its own."""
    return row.store, row.model, row.transfer, row.ranks


def _rest() -> tuple[Row, ...]:
    left = [row for row in FULL if cell(row) not in {cell(covered) for covered in COVER}]
    gateway, mini_lb = ([row for row in left if row.router == router] for router in ROUTERS)
    return tuple(pair[number % 2] for number, pair in enumerate(zip(gateway, mini_lb, strict=True)))


REST = _rest()
"""One row for each cell without one in `COVER`, over both routers in turns."""


def rows() -> tuple[Row, ...]:
    """The rows of this run, those with one reference together, because its outputs are made once."""
    chosen = REST if os.environ.get("DUALPATH_TEST_CELLS") else COVER
    if os.environ.get("DUALPATH_TEST_ALL"):
        chosen = FULL
    return tuple(sorted(chosen, key=lambda row: (row.model, row.ranks)))
