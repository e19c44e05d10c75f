"""README's table of what is tested together is the one that the end-to-end tests' rows make."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

from tests.e2e.cover import APART, COVER, FULL, REST, ROUTERS, Row, cell

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_in_the_readme_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("support_table", ROOT / "scripts" / "support_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    readme = (ROOT / "README.md").read_text()
    assert script.in_readme(readme) == script.table(), "run python scripts/support_table.py --write"


def test_the_rows_that_ci_runs_have_every_pair_of_values() -> None:
    assert set(COVER) <= set(FULL)
    for first, second in itertools.combinations(range(len(Row._fields)), 2):
        if (Row._fields[first], Row._fields[second]) != APART:
            assert {(row[first], row[second]) for row in COVER} == {(row[first], row[second]) for row in FULL}


def test_every_cell_has_a_row_in_ci_or_among_the_rest() -> None:
    assert sorted(map(cell, (*COVER, *REST))) == sorted({cell(row) for row in FULL})
    assert {row.router for row in REST} == set(ROUTERS)
