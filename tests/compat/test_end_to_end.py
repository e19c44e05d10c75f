"""The same refusals through the real command lines, and through a real server whose scheduler process cannot run."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.compat.conftest import Argv
from tests.compat.forks import ROOT, server_environment

# The first test of a run waits for the process that imports SGLang, too.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SCRIPTS = Path(sys.executable).parent


def run(command: Sequence[str], env: dict[str, str], limit_s: float = 200) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; every process that it started is gone afterwards."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit_s)
        return process.returncode, out, err
    finally:
        # The group holds what is left, also after a time-out.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)


@pytest.mark.parametrize(
    ("shell", "flags", "storage", "says"),
    [
        ([sys.executable, "-m", "sglang.launch_server"], (), None, "copy --hicache-storage-backend"),
        ([str(SCRIPTS / "sglang"), "serve"], ("--pp-size", "2"), "file", "--pp-size 2"),
    ],
    ids=["python -m sglang.launch_server", "sglang serve"],
)
def test_a_refused_command_line_ends_with_one_sentence(
    argv: Argv, shell: list[str], flags: tuple[str, ...], storage: str | None, says: str
) -> None:
    code, _, err = run([*shell, *argv("decode", *flags, storage=storage)], server_environment())
    assert code == 1, err
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if "--kv-connector dualpath" in line]
    assert len(said) == 1, err
    assert says in said[0]


BREAK_IN_CHILDREN = """
    # In processes that a server spawns: SGLang's tree lacks a method, as after a patch to it.
    import importlib.abc, importlib.util, sys

    TARGET = "sglang.srt.mem_cache.unified_radix_cache"


    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != TARGET:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            stock = spec.loader.exec_module

            def exec_module(module):
                stock(module)
                del module.UnifiedRadixCache._handle_prefetch_result

            spec.loader.exec_module = exec_module
            return spec


    if any("multiprocessing.spawn" in word for word in sys.orig_argv):
        sys.meta_path.insert(0, Finder())
"""


# Schedulers of a server with data-parallel ranks are children of a process that does not look whether they live.
@pytest.mark.parametrize("more", [(), ("--dp-size", "2")], ids=["one scheduler", "data parallel"])
def test_a_seam_missing_in_the_scheduler_process_alone_ends_the_server_with_a_sentence(
    argv: Argv, tmp_path: Path, more: tuple[str, ...]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(BREAK_IN_CHILDREN))
    env = server_environment() | {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(tmp_path / "store")}
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    flags = ("--host", "127.0.0.1", "--port", str(free_port()), "--max-total-tokens", "4096", "--hicache-ratio", "2")
    flags += more
    line = argv("decode", *flags, "--disable-overlap-schedule", "--sleep-on-idle", "--chunked-prefill-size", "2048")
    code, _, err = run([sys.executable, "-m", "sglang.launch_server", *line], env, limit_s=220)
    assert code != 0
    said = [line for line in err.splitlines() if "lacks what sglang_dualpath hooks into" in line]
    assert said, err[-3000:]
    assert "UnifiedRadixCache._handle_prefetch_result is missing" in said[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
