"""How a server ends that cannot run: with one sentence, in whatever process it shows. Does not import sglang."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from sglang_dualpath.errors import DualPathError


def stop(sentence: str) -> NoReturn:
    """End the process with one sentence. SGLang logs a plugin's exceptions and goes on, but lets this one through."""
    print(sentence, file=sys.stderr, flush=True)
    raise SystemExit(1)


def stop_on_error(check: Callable[[], None]) -> None:
    """Run ``check`` and end the process with its sentence if it raises one of our errors."""
    try:
        check()
    except DualPathError as error:
        stop(str(error))
