"""KV transfer between prefill and decode servers out of main memory."""

from __future__ import annotations

import functools
from typing import Any

from sglang_cpu_platform.hooks import assign, wrap


def _in_main_memory(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
        args.kv_data_mem_kinds = ["DRAM"] * len(args.kv_data_ptrs)
        original(self, args, *rest, **kwargs)

    return init


def install() -> None:
    """Hook the transfer backends.

    Raises:
        SystemExit: SGLang lacks a symbol that is replaced.
    """
    # Why: with host indices SGLang copies them through a pinned tensor and records a CUDA event.
    assign("sglang.srt.disaggregation.mooncake.conn", "MooncakeKVSender.supports_host_tensor_indices", False)
    nixl = "sglang.srt.disaggregation.nixl.conn"
    # Why: NIXL registers KV buffers as GPU memory unless told otherwise.
    wrap(nixl, "NixlKVManager.__init__", _in_main_memory)
