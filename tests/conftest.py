"""For all tests: hypothesis profiles, an audit that no test is skipped unnoticed, servers' errors with failed tests."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.server_logs import ServerLogs

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")
LOGS = Path(__file__).resolve().parents[1] / "out" / "e2e"

# No deadline: two cores that also run servers make any time per example meaningless. The common profile finds new
# examples each time; in CI a run must mean the same for the same commit, so there examples are derived from the test.
settings.register_profile("common", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("common"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "common")


def allowed_skips(text: str) -> set[str]:
    """Test ids of the committed list: one a line, with the reason behind a `#`. A test id may end in `*`."""
    lines = (line.split("#", 1)[0].strip() for line in text.splitlines())
    return {line for line in lines if line}


def is_allowed(test_id: str, allowed: set[str]) -> bool:
    return any(test_id == name or (name.endswith("*") and test_id.startswith(name[:-1])) for name in allowed)


class SkipAudit:
    """Fails a run in which a test was skipped that the committed list does not name."""

    def __init__(self, allowed: set[str]) -> None:
        self.allowed = allowed
        self.unlisted: list[str] = []

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        expected_failure = hasattr(report, "wasxfail")
        if report.skipped and not expected_failure and not is_allowed(report.nodeid, self.allowed):
            self.unlisted.append(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        # A module skipped as a whole (importorskip) reports here and nowhere else.
        self._note(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unlisted and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unlisted:
            terminalreporter.section("skipped, and not in tests/allowed_skips.txt", red=True)
            for test_id in self.unlisted:
                terminalreporter.line(test_id)


def pytest_configure(config: pytest.Config) -> None:
    allowed = allowed_skips(ALLOWED_SKIPS.read_text()) if ALLOWED_SKIPS.exists() else set()
    config.pluginmanager.register(SkipAudit(allowed), "skip-audit")
    config.pluginmanager.register(ServerLogs(LOGS), "server-logs")
