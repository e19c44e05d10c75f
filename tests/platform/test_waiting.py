"""Schedulers without work to do leave the core to others."""

from __future__ import annotations

import time

from sglang_cpu_platform.waiting import NAP_S, napping


class Scheduler:
    def __init__(self) -> None:
        self.turns = 0

    def on_idle(self) -> str:
        self.turns += 1
        return "idle"


def test_a_turn_without_work_does_what_it_did_and_takes_no_core() -> None:
    on_idle = napping(Scheduler.on_idle)
    scheduler = Scheduler()
    started, cpu = time.monotonic(), time.thread_time()
    assert {on_idle(scheduler) for _ in range(50)} == {"idle"}
    assert scheduler.turns == 50
    assert time.monotonic() - started >= 50 * NAP_S
    assert time.thread_time() - cpu < 25 * NAP_S
