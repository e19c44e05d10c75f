"""What this machine has of what the checks need."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Literal

REPOSITORY = Path(__file__).resolve().parents[2]
ENGINES: tuple[Literal["mooncake", "nixl"], ...] = ("mooncake", "nixl")
_WITHOUT_CUDA = "mooncake-transfer-engine-non-cuda"  # a build that takes a device address for one of main memory


def missing() -> str | None:
    """What is missing and what to do about it, in one sentence; None where the checks can run."""
    if not _has_module("sglang") or not _has_module("torch"):
        return f"SGLang is not installed for {sys.executable}: name another one, as in `make test-gpu GPU_PYTHON=PATH`."
    if not importlib.metadata.entry_points(group="sglang.srt.plugins", name="dualpath"):
        return "SGLang does not find sglang-dualpath: run `pip install .` in the checkout, in SGLang's environment."
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return (
            "torch finds no CUDA device here: run `make test-gpu` on a machine with an NVIDIA GPU, in an environment "
            "that has SGLang and this package."
        )
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} cannot compute in bf16: take a GPU of compute capability 8.0 or later."
    if engine() is None:
        wanted = os.environ.get("DUALPATH_GPU_TRANSFER") or "mooncake-transfer-engine (or nixl)"
        return f"There is no transfer engine for device memory: install {wanted} with pip."
    return None


def engine() -> Literal["mooncake", "nixl"] | None:
    """The transfer engine for PD and hop: the one that DUALPATH_GPU_TRANSFER names, else Mooncake, else NIXL.

    None where that is not there. A build of Mooncake without CUDA is none.
    """
    found = [name for name in ENGINES if _has_module(name)]
    if "mooncake" in found and _has_package(_WITHOUT_CUDA):
        found.remove("mooncake")
    wanted = os.environ.get("DUALPATH_GPU_TRANSFER")
    return next((name for name in found if wanted in (None, "", name)), None)


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _has_package(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
