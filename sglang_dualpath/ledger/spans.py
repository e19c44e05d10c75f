"""Sets of pages as sorted runs.

A read of thousands of pages has a handful of runs (one unclaimed run between two readers, until something fails), so
every operation here costs runs, not pages.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

Run = tuple[int, int]
"""Pages first .. end, the end not included; never empty."""


class Spans:
    """A set of pages. `add` and `remove` change it in place; the others leave it, and may return it itself."""

    __slots__ = ("_runs",)

    def __init__(self, first: int = 0, end: int = 0) -> None:
        # Sorted, disjoint, and never touching one another.
        self._runs: list[Run] = [(first, end)] if first < end else []

    def __bool__(self) -> bool:
        return bool(self._runs)

    def __len__(self) -> int:
        return sum(end - first for first, end in self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def __repr__(self) -> str:
        return f"Spans({', '.join(f'{first}..{end}' for first, end in self._runs)})"

    @property
    def lowest(self) -> Run:
        """The first run. Raises IndexError if the set is empty."""
        return self._runs[0]

    @property
    def highest(self) -> Run:
        """The last run. Raises IndexError if the set is empty."""
        return self._runs[-1]

    def add(self, first: int, end: int) -> None:
        if first >= end:
            return
        low = self._first_reaching(first)
        high = low
        while high < len(self._runs) and self._runs[high][0] <= end:
            first = min(first, self._runs[high][0])
            end = max(end, self._runs[high][1])
            high += 1
        self._runs[low:high] = [(first, end)]

    def remove(self, first: int, end: int) -> None:
        if first >= end:
            return
        low = self._first_reaching(first)
        high = low
        rest: list[Run] = []
        while high < len(self._runs) and self._runs[high][0] < end:
            run_first, run_end = self._runs[high]
            if run_first < first:
                rest.append((run_first, min(run_end, first)))
            if run_end > end:
                rest.append((end, run_end))
            high += 1
        self._runs[low:high] = rest

    def minus(self, other: Spans) -> Spans:
        if not other:
            return self
        result = Spans()
        result._runs = self._runs.copy()
        for first, end in other:
            result.remove(first, end)
        return result

    def plus(self, other: Spans) -> Spans:
        if not other:
            return self
        result = Spans()
        result._runs = self._runs.copy()
        for first, end in other:
            result.add(first, end)
        return result

    def within(self, first: int, end: int) -> Spans:
        """The part from `first` up to, not including, `end`."""
        result = Spans()
        result._runs = [(max(f, first), min(e, end)) for f, e in self._runs if f < end and e > first]
        return result

    def common(self, other: Spans) -> Spans:
        result = Spans()
        for first, end in other:
            result._runs += self.within(first, end)
        return result

    def _first_reaching(self, page: int) -> int:
        """Index of the first run that ends at `page` or later."""
        index = bisect_left(self._runs, (page,))
        if index and self._runs[index - 1][1] >= page:
            return index - 1
        return index
