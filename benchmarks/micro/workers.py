"""An object in a process of its own, whose methods are called from here: the two ends of whatever is measured."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple

_SPAWN = multiprocessing.get_context("spawn")  # forked, the ends would share threads' locks and transfer engines
_END_S = 5.0


class Cpu(NamedTuple):
    """CPU seconds of a process, all of its threads."""

    user_s: float
    system_s: float

    @property
    def total_s(self) -> float:
        return self.user_s + self.system_s

    def since(self, before: Cpu) -> Cpu:
        return Cpu(self.user_s - before.user_s, self.system_s - before.system_s)


class WorkerError(RuntimeError):
    """A method of a worker's object raised; the text is its traceback."""


class Worker:
    """A process that makes `factory(*arguments)` and answers calls. Context manager; leaving it ends the process.

    Its standard output goes to standard error, so that a benchmark's own output stays readable by programs.
    `environment` is set before `factory` runs: transfer engines read theirs when they are made.
    """

    def __init__(
        self, name: str, factory: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        """Raises WorkerError when `factory` does."""
        self._connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(
            target=_serve, args=(theirs, factory, arguments, dict(environment or {})), name=name, daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            self._result()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method returns. Raises WorkerError when it raises, or when the process has ended."""
        self._connection.send((method, arguments))
        return self._result()

    def cpu(self) -> Cpu:
        """CPU seconds that the process has used so far."""
        return Cpu(*self.call("__cpu__"))

    def _result(self) -> Any:
        try:
            good, value = self._connection.recv()
        except EOFError:
            raise WorkerError(f"{self._process.name} has ended") from None
        if not good:
            raise WorkerError(f"{self._process.name}:\n{value}")
        return value

    def close(self) -> None:
        """End the process; idempotent."""
        self._connection.close()  # which it takes for the end
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve(
    connection: Connection, factory: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the benchmark, which then ends its workers
    os.dup2(2, 1)
    os.environ.update(environment)
    made: Any = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            made = factory(*arguments)
        except Exception:
            connection.send((False, traceback.format_exc()))
            return
        connection.send((True, None))
        while True:
            method, given = connection.recv()
            try:
                answer = (True, _cpu() if method == "__cpu__" else getattr(made, method)(*given))
            except Exception:
                answer = (False, traceback.format_exc())
            connection.send(answer)
    if hasattr(made, "close"):
        made.close()
    # Without destructors of libraries: NIXL's wheels bring one (libnl-route) that crashes.
    os._exit(0)


def _cpu() -> tuple[float, float]:
    # To the microsecond; /proc/PID/stat, which psutil reads, counts in hundredths of a second.
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime, usage.ru_stime
