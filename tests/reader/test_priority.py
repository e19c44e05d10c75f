"""Threads that wait for transfers give way, each by its own measure."""

from __future__ import annotations

import os
import threading

import pytest

from sglang_dualpath.reader.priority import PUSHING, READING, give_way


def _nice() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_a_thread_gives_way_and_the_one_it_starts_by_its_own_measure() -> None:
    usual, seen = _nice(), []

    def pusher() -> None:
        seen.append(_nice())  # inherited from the reader
        give_way(PUSHING)
        seen.append(_nice())

    def reader() -> None:
        give_way(READING)
        seen.append(_nice())
        started = threading.Thread(target=pusher)
        started.start()
        started.join()

    thread = threading.Thread(target=reader)
    thread.start()
    thread.join()
    if os.geteuid() == 0:  # others may not take back what they inherited
        assert seen == [min(19, usual + READING), min(19, usual + READING), min(19, usual + PUSHING)]
    else:
        assert seen[0] == min(19, usual + READING)
    assert _nice() == usual


def test_what_cannot_be_done_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: int) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(os, "setpriority", refused)
    give_way(READING)
