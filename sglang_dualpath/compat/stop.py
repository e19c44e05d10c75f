"""How a server ends that cannot run: with one sentence, in whatever process it shows. Does not import sglang."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sglang_dualpath.errors import DualPathError

# The title that SGLang gives the process which starts the schedulers of a server with --dp-size.
_CONTROLLER = b"sglang::data_parallel_controller"


def stop(sentence: str) -> NoReturn:
    """End the process with one sentence. SGLang logs a plugin's exceptions and goes on, but lets this one through."""
    print(sentence, file=sys.stderr, flush=True)
    _end_controller()
    raise SystemExit(1)


def _end_controller() -> None:
    """End the data-parallel controller, if that is the parent, so that the server ends.

    It waits for its schedulers to be ready without looking whether they live, and the main process looks at it alone.
    To be removed when it notices by itself that a scheduler has ended.
    """
    parent = os.getppid()
    with contextlib.suppress(OSError):
        if Path(f"/proc/{parent}/cmdline").read_bytes().startswith(_CONTROLLER):
            os.kill(parent, signal.SIGTERM)


def stop_on_error(check: Callable[[], None]) -> None:
    """Run ``check`` and end the process with its sentence if it raises one of our errors."""
    try:
        check()
    except DualPathError as error:
        stop(str(error))
