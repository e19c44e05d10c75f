"""The platform class that SGLang instantiates."""

from __future__ import annotations

import os
from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from sglang_cpu_platform import attention, disaggregation, host_pools, waiting


class DualPathCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """SGLang's CPU device operations, with everything of the engine above them in plain torch.

    It declares itself out of tree, so that SGLang does not take the paths of its own CPU engine, which needs a build
    of ``sgl_kernel`` that exists for no wheel.
    """

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def init_backend(self) -> None:
        """Install the hooks. SGLang calls this in every process that imports its model runner.

        Raises:
            SystemExit: SGLang lacks a symbol that a hook replaces, or ``SGLANG_USE_CPU_ENGINE`` is set.
        """
        if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
            raise SystemExit(
                "sglang_cpu_platform needs SGLANG_USE_CPU_ENGINE unset: "
                "SGLang's own CPU engine imports a build of sgl_kernel that has no wheel."
            )
        attention.install()
        host_pools.install()
        disaggregation.install()
        waiting.install()
