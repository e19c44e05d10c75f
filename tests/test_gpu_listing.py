"""`make test-gpu` where there is no GPU: it says so, names every check, and is no failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("pool_checks.py", "server_checks.py")


def listing(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu", *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )


def checks() -> list[str]:
    """Names of the checks, as they stand in the files."""
    lines = [line.strip() for name in MODULES for line in (ROOT / "tests" / "gpu" / name).read_text().splitlines()]
    return [line.removeprefix("def ").partition("(")[0] for line in lines if line.startswith("def test_")]


def test_without_a_gpu_every_check_is_named_and_skipped() -> None:
    answer = listing()
    assert answer.returncode == 0, answer.stderr
    assert "make test-gpu` on a machine with an NVIDIA GPU" in answer.stdout
    lines = [line.strip() for line in answer.stdout.splitlines()]
    assert len(checks()) >= 7
    for name in checks():
        assert f"{name}: skipped" in lines
        described = [line.partition(": ")[2] for line in lines if line.startswith(f"{name}: ")]
        assert any(text not in ("skipped", "None") for text in described), f"{name} has no docstring"


def test_checks_can_be_chosen_by_name() -> None:
    assert listing("-k", "storm").stdout.count(": skipped") == 1
    assert listing("-k", "no such check").returncode == 2


def test_pytest_leaves_the_checks_alone() -> None:
    files = list((ROOT / "tests" / "gpu").glob("*.py"))
    assert len(files) >= len(MODULES)
    assert not [path.name for path in files if path.name.startswith("test_") or path.name.endswith("_test.py")]
