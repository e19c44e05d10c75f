"""A process that must stop takes SGLang's data-parallel controller with it, and no other parent."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# A parent of this title, whose child must stop; then it waits as SGLang's controller does.
PARENT = """
import subprocess, sys, time
import setproctitle

setproctitle.setproctitle({title!r})
child = "from sglang_dualpath.compat.stop import stop; stop('The reason.')"
print(subprocess.run([sys.executable, "-c", child]).returncode, flush=True)
time.sleep({waits_s})
"""


@pytest.mark.parametrize(
    ("title", "ends"), [("sglang::data_parallel_controller", True), ("sglang::scheduler", False), ("python", False)]
)
def test_the_controller_ends_with_its_scheduler(title: str, ends: bool) -> None:
    command = [sys.executable, "-c", PARENT.format(title=title, waits_s=60 if ends else 0)]
    parent = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert parent.stderr.strip() == "The reason."
    assert parent.returncode == (-signal.SIGTERM if ends else 0)
    if not ends:
        assert parent.stdout.strip() == "1"
