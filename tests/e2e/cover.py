"""Which combinations of store, router, model and transfer backend the end-to-end tests run.

`COVER` has every pair of values of any two factors at least once; `DUALPATH_TEST_ALL=1` (``make test-all``) runs the
full cross instead.
"""

from __future__ import annotations

import itertools
import os
from typing import Literal, NamedTuple

Store = Literal["mooncake", "file", "nixl", "dynamic"]
Router = Literal["gateway", "mini_lb"]
Model = Literal["gqa", "mla"]
Transfer = Literal["mooncake", "nixl"]

STORES: tuple[Store, ...] = ("mooncake", "file", "nixl", "dynamic")
ROUTERS: tuple[Router, ...] = ("gateway", "mini_lb")
MODELS: tuple[Model, ...] = ("gqa", "mla")
TRANSFERS: tuple[Transfer, ...] = ("mooncake", "nixl")


class Row(NamedTuple):
    """One cluster that is started."""

    store: Store
    router: Router
    model: Model
    transfer: Transfer

    def __str__(self) -> str:
        return "-".join(self)


COVER = (
    Row("mooncake", "gateway", "gqa", "mooncake"),
    Row("mooncake", "mini_lb", "mla", "nixl"),
    Row("file", "gateway", "mla", "nixl"),
    Row("file", "mini_lb", "gqa", "mooncake"),
    Row("nixl", "gateway", "gqa", "nixl"),
    Row("nixl", "mini_lb", "mla", "mooncake"),
    Row("dynamic", "gateway", "mla", "mooncake"),
    Row("dynamic", "mini_lb", "gqa", "nixl"),
)
FULL = tuple(Row(*values) for values in itertools.product(STORES, ROUTERS, MODELS, TRANSFERS))


def rows() -> tuple[Row, ...]:
    """The rows of this run, those of one model together, because its reference outputs are made once."""
    chosen = FULL if os.environ.get("DUALPATH_TEST_ALL") else COVER
    return tuple(sorted(chosen, key=lambda row: row.model))
