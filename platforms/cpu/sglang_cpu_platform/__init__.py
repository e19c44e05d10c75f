"""An SGLang platform for machines without an accelerator, meant for tests.

SGLang finds the package by its entry point in the group ``sglang.srt.platforms`` and uses it only when the
environment variable ``SGLANG_PLATFORM`` is ``dualpath_cpu``.
"""

from __future__ import annotations

import os

PLATFORM_NAME = "dualpath_cpu"


def activate() -> str | None:
    """Return the qualified name of the platform class, or None unless ``SGLANG_PLATFORM`` names this platform.

    Without the variable SGLang asks every installed platform whether it wants the machine. This one never volunteers,
    or it would take over machines that have a GPU.
    """
    if os.environ.get("SGLANG_PLATFORM") != PLATFORM_NAME:
        return None
    return "sglang_cpu_platform.device.DualPathCpuPlatform"
