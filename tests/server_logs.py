"""With a failed end-to-end test: what the servers' logs said meanwhile. A run in CI leaves nothing else of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

LINES_PER_LOG = 8
LINE_CHARS = 400
_TROUBLE = re.compile(r"^[EF]\d{4,8} |\b(ERROR|CRITICAL|FATAL)\b|Traceback|(Error|Exception)\b")


def trouble(text: str) -> list[str]:
    """The last lines that tell of an error, each cut to LINE_CHARS."""
    return [line[:LINE_CHARS] for line in text.splitlines() if _TROUBLE.search(line)][-LINES_PER_LOG:]


class ServerLogs:
    """Notes how long each log is when a test starts, and prints its errors since then when the test has failed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sizes: dict[Path, int] = {}
        self._found: list[str] = []

    def since_start(self) -> list[str]:
        found = []
        for path in sorted(self._directory.rglob("*.log")):
            with path.open("rb") as log:
                start = self._sizes.get(path, 0)
                # A log that has become shorter was begun anew.
                log.seek(start if path.stat().st_size >= start else 0)
                text = log.read().decode(errors="replace")
            name = path.relative_to(self._directory).with_suffix("")
            found += [f"LOG {name}: {line}" for line in trouble(text)]
        return found

    def pytest_runtest_logstart(self) -> None:
        self._sizes = {path: path.stat().st_size for path in self._directory.rglob("*.log")}

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
