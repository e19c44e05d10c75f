"""Runs a scenario in a fresh copy of a process that has imported SGLang once, in a second instead of twenty.

`ForkServer` is the side of the tests. `main` is the process that forks: it reads one request a line from its standard
input, and answers one line. What it imports is SGLang alone, nothing of this package, so that a scenario sees what a
new process would.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PATCHED = os.environ.get("DUALPATH_PATCHED_SGLANG", "")
"""Where the copy of SGLang is that `make check-patches` tests against; empty for the installed one."""
START_S = 250  # of 20 where nothing else runs and the files are cached
CASE_S = 60


class Outcome(NamedTuple):
    """What became of one scenario."""

    code: int
    stdout: str
    stderr: str
    report: Any
    """What the scenario returned or noted, None if it ended before."""

    @property
    def sentence(self) -> str:
        """What it wrote to stderr besides its log, after asserting that it is one line and that it ended by itself."""
        assert self.code == 1, self
        said = [line for line in self.stderr.splitlines() if not _is_log(line)]
        assert len(said) == 1, self.stderr
        return said[0]


def _is_log(line: str) -> bool:
    """Log lines have a time in brackets once SGLang has set its logging up."""
    return line.startswith("[20")


def server_environment() -> dict[str, str]:
    """This process's environment without settings of SGLang's, for the CPU platform."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "MC_", "MOONCAKE_"))}
    return kept | {
        "SGLANG_PLATFORM": "dualpath_cpu",
        "SGLANG_CPU_PLATFORM_HOST_RESERVE_BYTES": str(1 << 30),
        "OMP_NUM_THREADS": "1",
        "MC_FORCE_TCP": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), PATCHED])),
    }


Request = dict[str, Any]
"""A scenario, its arguments, what is on top of its environment, and how long it may take."""


def request(scenario: str, *args: Any, env: Mapping[str, str] | None = None, limit_s: float = CASE_S) -> Request:
    return {"scenario": scenario, "args": args, "env": dict(env or {}), "limit_s": limit_s}


class ForkServer:
    """One preloaded process. `run` may be called from one thread at a time."""

    def __init__(self, log: Path) -> None:
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.compat.forks"],
                cwd=ROOT,
                env=server_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        self._log = log
        self._known: dict[str, Outcome] = {}
        self._ask(None, START_S)

    def run(self, scenario: str, *args: Any, env: Mapping[str, str] | None = None, limit_s: float = CASE_S) -> Outcome:
        """Call `tests.compat.scenarios.<scenario>(*args)` in a new process whose environment has `env` on top."""
        return self.run_all([request(scenario, *args, env=env, limit_s=limit_s)])[0]

    def run_all(self, requests: Sequence[Request]) -> list[Outcome]:
        """Run several, each in a process of its own, as many at a time as there are cores.

        The same question is asked once: every process starts from the same state.
        """
        keys = [json.dumps(one) for one in requests]
        unknown = [one for one, key in zip(requests, keys, strict=True) if key not in self._known]
        if unknown:
            answer = json.loads(self._ask(json.dumps(unknown), 10 + sum(one["limit_s"] for one in unknown)))
            for one, outcome in zip(unknown, answer, strict=True):
                self._known[json.dumps(one)] = Outcome(*outcome)
        return [self._known[key] for key in keys]

    def _ask(self, question: str | None, limit_s: float) -> str:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        if question is not None:
            stdin.write(question.encode() + b"\n")
            stdin.flush()
        ready, _, _ = select.select([stdout], [], [], limit_s)
        line = stdout.readline() if ready else b""
        assert line, f"the process that forks said nothing in {limit_s} s: {self._log.read_text()[-2000:]}"
        return line.decode()

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def note(report: Any) -> None:
    """Hand a report to the test, from a scenario that does not return."""
    Path(os.environ["TEST_REPORT"]).write_text(json.dumps(report))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever SGLang prints is not an answer
    for module in (
        "sglang.launch_server",
        "sglang.cli.main",
        "sglang.cli.serve",
        "sglang.srt.arg_groups.pipeline",
        "sglang.srt.entrypoints.engine",
        "sglang.srt.entrypoints.http_server",
        "sglang.srt.managers.scheduler",
        "sglang.srt.mem_cache.unified_radix_cache",
    ):
        importlib.import_module(module)
    # What is there now is never looked at by a collection again, which would copy its pages into every child.
    gc.collect()
    gc.freeze()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(fork_all(json.loads(line))), file=answers, flush=True)


def fork_all(requests: Sequence[Request]) -> list[Outcome]:
    """Run each scenario in a copy of this process of its own, as many at a time as there are cores."""
    waiting, running, outcomes = deque(enumerate(requests)), dict[int, _Case](), dict[int, Outcome]()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            number, one = waiting.popleft()
            running[number] = _Case(one)
        for number, case in list(running.items()):
            outcome = case.outcome()
            if outcome is not None:
                outcomes[number] = outcome
                del running[number]
        time.sleep(0.002)
    return [outcomes[number] for number in range(len(requests))]


class _Case:
    """A running child."""

    def __init__(self, one: Request) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._files = {name: Path(self._directory.name, name) for name in ("stdout", "stderr", "report")}
        self._deadline = time.monotonic() + one["limit_s"]
        self._pid = os.fork()
        if self._pid == 0:
            _become(one, self._files)

    def outcome(self) -> Outcome | None:
        """None while it runs. One that takes too long is killed, so its code is that of the signal."""
        if time.monotonic() > self._deadline:
            os.kill(self._pid, signal.SIGKILL)
        done, status = os.waitpid(self._pid, os.WNOHANG)
        if not done:
            return None
        text = {name: path.read_text() if path.exists() else "" for name, path in self._files.items()}
        self._directory.cleanup()
        report = json.loads(text["report"]) if text["report"] else None
        return Outcome(os.waitstatus_to_exitcode(status), text["stdout"], text["stderr"], report)


def _become(one: Request, files: Mapping[str, Path]) -> None:
    """In the child: run the scenario and exit as the interpreter would."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(files[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(one["env"], TEST_REPORT=str(files["report"]))
    code = 0
    try:
        scenarios = importlib.import_module("tests.compat.scenarios")
        scenario: Callable[..., Any] = getattr(scenarios, one["scenario"])
        arguments: Sequence[Any] = one["args"]
        report = scenario(*arguments)
        if report is not None:
            note(report)
    except SystemExit as stop:
        code = _exit_code(stop)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
