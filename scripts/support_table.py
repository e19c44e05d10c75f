"""Writes README's table of what is tested together, out of the rows that the end-to-end tests run.

    python scripts/support_table.py            # print it
    python scripts/support_table.py --write    # put it into README.md
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.e2e.cover import COVER, MODELS, RANKS, STORES, TRANSFERS, cell  # noqa: E402

BEGIN = "<!-- written by scripts/support_table.py -->\n"
END = "<!-- end of what is written by scripts/support_table.py -->\n"
NAMES = {"gqa": "MHA / GQA", "mla": "MLA", "tp1": "1", "tp2": "2"}


def table() -> str:
    """The table, as Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in _lines())


def _lines() -> Iterator[list[str]]:
    yield ["transfer", "model", "tensor parallel", "host layout", *(f"store `{store}`" for store in STORES)]
    yield ["---"] * (4 + len(STORES))
    in_ci = set(map(cell, COVER))
    for transfer, model, ranks in itertools.product(TRANSFERS, MODELS, RANKS):
        cells = ["CI" if (store, model, transfer, ranks) in in_ci else "`make test-cells`" for store in STORES]
        yield [f"`{transfer}`", NAMES[model], NAMES[ranks], "`page_first_direct`", *cells]
    # Copied by kernels, which need a GPU: `make test-gpu` has servers of one kind.
    on_a_gpu = ["`make test-gpu`" if store == "file" else "not run" for store in STORES]
    yield ["either", NAMES["gqa"], NAMES["tp1"], "`page_first`", *on_a_gpu]
    yield ["either", "others", "others", "`page_first`", *["not run"] * len(STORES)]
    yield ["others", "others", "-", "others", *["refused"] * len(STORES)]


def in_readme(readme: str) -> str:
    """The table that a README has. Raises ValueError if it has none."""
    return readme[readme.index(BEGIN) + len(BEGIN) : readme.index(END)]


def main() -> None:
    if sys.argv[1:] == ["--write"]:
        path = ROOT / "README.md"
        text = path.read_text()
        path.write_text(text.replace(BEGIN + in_readme(text), BEGIN + table()))
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
