"""The list of clusters leaves out no pair of settings. Starts nothing."""

from __future__ import annotations

import itertools

from tests.e2e.cover import COVER, FULL


def test_every_pair_of_settings_is_in_the_cover() -> None:
    def pairs(rows: tuple[tuple[str, ...], ...]) -> set[tuple[int, int, str, str]]:
        columns = range(len(rows[0]))
        return {(a, b, row[a], row[b]) for row in rows for a, b in itertools.combinations(columns, 2)}

    assert pairs(COVER) == pairs(FULL)
    assert len(set(COVER)) == len(COVER)
