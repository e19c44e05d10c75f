"""Objects in processes of their own."""

from __future__ import annotations

import os

import pytest

from benchmarks.micro.workers import Cpu, Worker, WorkerError


class Calculator:
    def __init__(self, start: int) -> None:
        if start < 0:
            raise ValueError("not from there")
        self.total = start

    def add(self, number: int) -> int:
        self.total += number
        return self.total

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def fail(self) -> None:
        raise LookupError("on purpose")

    def leave(self) -> None:
        os._exit(3)


def test_methods_are_called_in_another_process_that_keeps_its_state() -> None:
    with Worker("calculator", Calculator, 5, environment={"MICRO_TEST": "here"}) as worker:
        assert worker.call("add", 2) == 7
        assert worker.call("add", 3) == 10
        assert worker.call("variable", "MICRO_TEST") == "here"
        assert "MICRO_TEST" not in os.environ
        with pytest.raises(WorkerError, match="LookupError: on purpose"):
            worker.call("fail")
        assert worker.call("add", 0) == 10
        assert worker.cpu().total_s > 0
        with pytest.raises(WorkerError, match="calculator has ended"):
            worker.call("leave")


def test_an_object_that_cannot_be_made_is_reported() -> None:
    with pytest.raises(WorkerError, match="not from there"):
        Worker("calculator", Calculator, -1)


def test_cpu_time_is_counted_from_a_moment_on() -> None:
    assert Cpu(3.0, 2.0).since(Cpu(1.0, 0.5)) == Cpu(2.0, 1.5)
    assert Cpu(2.0, 1.5).total_s == 3.5
