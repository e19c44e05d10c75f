"""Errors that servers logged while a test failed are shown with it; others are not."""

from pathlib import Path

import pytest

from tests.server_logs import LINE_CHARS, LINES_PER_LOG, ServerLogs, trouble


def report(*, failed: bool, end_to_end: bool = True) -> pytest.TestReport:
    keywords = {"e2e": 1} if end_to_end else {}
    outcome = "failed" if failed else "passed"
    return pytest.TestReport("test_it.py::test_it", ("test_it.py", 1, "test_it"), keywords, outcome, None, "call")  # type: ignore[arg-type]


class Terminal:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def section(self, title: str) -> None:
        self.lines.append(title)

    def line(self, line: str) -> None:
        self.lines.append(line)


def shown(logs: ServerLogs) -> list[str]:
    terminal = Terminal()
    logs.pytest_terminal_summary(terminal)  # type: ignore[arg-type]
    return terminal.lines


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "faults" / "prefill.log"
    path.parent.mkdir()
    path.write_text("ERROR of an earlier test\n")
    return path


@pytest.mark.parametrize(
    "line",
    [
        "E1121 19:20:01 tcp_transport.cpp:281] connection refused",
        "[2026-11-21 19:20:01] ERROR conn.py: Session 10.0.0.1:15000 failed.",
        "RuntimeError: Transfer thread failed",
    ],
)
def test_what_a_server_logged_while_a_test_failed_is_shown(log: Path, line: str) -> None:
    logs = ServerLogs(log.parents[1])
    logs.pytest_runtest_logstart()
    with log.open("a") as file:
        file.write(f"INFO all is well\n{line}\n")
    logs.pytest_runtest_logreport(report(failed=True))
    assert shown(logs)[1:] == ["LOG of test_it.py::test_it, call:", f"LOG faults/prefill: {line}"]


@pytest.mark.parametrize("case", [report(failed=False), report(failed=True, end_to_end=False)])
def test_nothing_is_shown_with_tests_that_pass_or_have_no_servers(log: Path, case: pytest.TestReport) -> None:
    logs = ServerLogs(log.parents[1])
    logs.pytest_runtest_logreport(case)
    assert shown(logs) == []


def test_a_log_begun_anew_is_read_from_its_start(log: Path) -> None:
    logs = ServerLogs(log.parents[1])
    logs.pytest_runtest_logstart()
    log.write_text("ERROR new\n" + "longer than before\n" * 9)
    assert logs.since_start() == ["LOG faults/prefill: ERROR new"]


def test_much_trouble_is_cut() -> None:
    found = trouble("\n".join(f"ERROR {number} " + "x" * 1000 for number in range(100)))
    assert len(found) == LINES_PER_LOG
    assert found[-1].startswith("ERROR 99 ")
    assert all(len(line) <= LINE_CHARS for line in found)
