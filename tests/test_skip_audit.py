import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
CONFTEST = Path(__file__).with_name("conftest.py").read_text()
SKIPPING = "import pytest\n\ndef test_runs(): pass\n\ndef test_skips(): pytest.skip('no reason')\n"
EXPECTED_FAILURE = "import pytest\n\n@pytest.mark.xfail\ndef test_fails(): assert False\n"


@pytest.fixture
def project(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def run_pytest(project):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:cov"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def test_unlisted_skip_fails_the_run(project):
    (project / "test_it.py").write_text(SKIPPING)
    result = run_pytest(project)
    assert result.returncode == 1
    assert "test_it.py::test_skips" in result.stdout


@pytest.mark.parametrize("line", ["test_it.py::test_skips  # it may", "test_it.py::*"])
def test_listed_skip_passes(project, line):
    (project / "test_it.py").write_text(SKIPPING)
    (project / "allowed_skips.txt").write_text(line + "\n")
    assert run_pytest(project).returncode == 0


def test_unlisted_module_skip_fails_the_run(project):
    (project / "test_it.py").write_text("import pytest\n\npytest.importorskip('no_such_module_at_all')\n")
    result = run_pytest(project)
    assert result.returncode == 1
    assert "not in tests/allowed_skips.txt" in result.stdout


def test_expected_failure_is_no_skip(project):
    (project / "test_it.py").write_text(EXPECTED_FAILURE)
    assert run_pytest(project).returncode == 0
