"""Ledger operations per second: two readers drain one read from both ends."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from benchmarks.micro.report import Report
from sglang_dualpath.ledger import End, Grant, Ledger, Refusal, Reserve, Share

LEASE_S = 1.0
IN_FLIGHT = 2  # open claims of each reader, as `--dualpath-claims-in-flight` has it


@dataclass(frozen=True)
class LedgerSettings:
    """`chunks` are sizes of a claim in pages; a claim and its landing are two operations."""

    pages: int = 2000
    chunks: tuple[int, ...] = (1, 4)
    repetitions: int = 20


class _Reader:
    """One reader of a drain: claims up to IN_FLIGHT chunks and lands the oldest."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        self._ledger = ledger
        self._name = name
        self._open: deque[int] = deque()
        self.operations = 0
        self.pages = 0
        self.met = False

    def step(self, now_s: float) -> None:
        while not self.met and len(self._open) < IN_FLIGHT:
            answer = self._ledger.claim(self._name, max_pages=None, now_s=now_s)
            self.operations += 1
            if isinstance(answer, Grant):
                self._open.append(answer.claim_id)
            else:
                self.met = not answer.retry
                break
        if self._open:
            self.pages += self._ledger.land(self._open.popleft(), now_s=now_s).pages
            self.operations += 1

    @property
    def done(self) -> bool:
        return self.met and not self._open


def drain(pages: int, chunk_pages: int, *, held_pages: int) -> tuple[int, float]:
    """Operations, and the seconds they took, until every page of one read has landed.

    A remote reader claims from the front under leases, backed by a reserve, and holds the first `held_pages` in memory;
    the local one claims from the back. Raises RuntimeError when a page is missing at the end.
    """
    reserve = Reserve(range(pages, pages + 2 * IN_FLIGHT * chunk_pages))
    ledger = Ledger(first_page=0, slots=range(pages), storage_end_page=pages, reserve=reserve, chunk_pages=chunk_pages)
    ledger.join("back", Share(End.BACK), local=True)
    ledger.join("front", Share(End.FRONT, lease_s=LEASE_S, exposed=True))
    if held_pages:
        ledger.reserve_range("front", 0, held_pages, until_s=LEASE_S)
    front, back = _Reader(ledger, "front"), _Reader(ledger, "back")
    start_s = time.perf_counter()
    while not ledger.settled_through(pages):
        # The ledger's own time stands still: no lease ends because this machine was busy.
        front.step(0.0)
        back.step(0.0)
    elapsed_s = time.perf_counter() - start_s
    if front.pages + back.pages != pages or not isinstance(ledger.claim("front", max_pages=1, now_s=0.0), Refusal):
        raise RuntimeError(f"{front.pages} + {back.pages} pages landed of {pages}")
    return front.operations + back.operations, elapsed_s


def run(settings: LedgerSettings) -> Report:
    """Operations per second with and without pages reserved for the reader that holds them in memory."""
    report = Report("ledger", {"pages": settings.pages, "in_flight": IN_FLIGHT, "repetitions": settings.repetitions})
    cases = [(chunk, held) for chunk in settings.chunks for held in (0, settings.pages // 2)]
    samples: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for case in cases:
        drain(settings.pages, case[0], held_pages=case[1])
    for _ in range(settings.repetitions):
        for case in cases:
            operations, elapsed_s = drain(settings.pages, case[0], held_pages=case[1])
            samples[case].append(operations / elapsed_s)
    for (chunk, held), rates in samples.items():
        report.add("claims and landings", "1/s", rates, chunk_pages=chunk, held_pages=held)
    return report
