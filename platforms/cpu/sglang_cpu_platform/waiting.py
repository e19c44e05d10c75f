"""A scheduler that waits for a transfer or for storage leaves its core to those who do the work."""

from __future__ import annotations

import functools
import time
from typing import Any

from sglang_cpu_platform.hooks import wrap

# Long against a turn of the scheduler's loop, so that looking takes little of a core, and short against what it waits
# for: a page of 1 MiB takes 42 ms on a link of 200 Mbit/s.
NAP_S = 0.005


def napping(original: Any) -> Any:
    """Replacement of ``Scheduler.on_idle``: the same, then a nap."""

    @functools.wraps(original)
    def on_idle(self: Any) -> Any:
        result = original(self)
        time.sleep(NAP_S)
        return result

    return on_idle


def _with_naps(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        # Here, as the scheduler's module is still being imported when platforms are initialized.
        wrap("sglang.srt.managers.scheduler", "Scheduler.on_idle", napping)

    return init


def install() -> None:
    """Let ``--sleep-on-idle`` also cover a scheduler that has requests but nothing to compute for them.

    Raises:
        SystemExit: SGLang lacks a symbol that is replaced.
    """
    # Why: SGLang's loop spins while requests wait for storage or a transfer. Beside a GPU that is one core of many;
    # here two servers take both cores from the threads that they wait for.
    wrap("sglang.srt.managers.scheduler_components.idle_sleeper", "IdleSleeper.__init__", _with_naps)
