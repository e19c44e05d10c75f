"""With a failed end-to-end test: what the servers' logs said meanwhile. A run in CI leaves nothing else of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

LINES_PER_LOG = 8
LINE_CHARS = 400
_HEAD_BYTES = 200  # servers' first line has the time in it
_TROUBLE = re.compile(r"^[EF]\d{4,8} |\b(ERROR|CRITICAL|FATAL)\b|Traceback|(Error|Exception)\b")


def _start(path: Path) -> tuple[int, bytes]:
    with path.open("rb") as log:
        return path.stat().st_size, log.read(_HEAD_BYTES)


def trouble(text: str) -> list[str]:
    """The last lines that tell of an error, each cut to LINE_CHARS."""
    return [line[:LINE_CHARS] for line in text.splitlines() if _TROUBLE.search(line)][-LINES_PER_LOG:]


class ServerLogs:
    """Notes how long each log is when a test starts, and prints its errors since then when the test has failed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._starts: dict[Path, tuple[int, bytes]] = {}
        """Length and first bytes of each log."""
        self._found: list[str] = []

    def since_start(self) -> list[str]:
        found = []
        for path in sorted(self._directory.rglob("*.log")):
            content = path.read_bytes()
            length, head = self._starts.get(path, (0, b""))
            # A log that begins with other words was begun anew.
            text = content[length if content[:_HEAD_BYTES].startswith(head) else 0 :].decode(errors="replace")
            name = path.relative_to(self._directory).with_suffix("")
            found += [f"LOG {name}: {line}" for line in trouble(text)]
        return found

    def pytest_runtest_logstart(self) -> None:
        self._starts = {path: _start(path) for path in self._directory.rglob("*.log")}

    def note(self, what: str) -> None:
        """Show the errors since the test's start at the end of the run, under ``what``."""
        self._found += [f"LOG of {what}:", *self.since_start()]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and "e2e" in report.keywords:
            self.note(f"{report.nodeid}, {report.when}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._found:
            terminalreporter.section("errors in the servers' logs")
            for line in self._found:
                terminalreporter.line(line)
