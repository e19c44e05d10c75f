"""KV transfer between prefill and decode servers out of main memory."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from sglang_cpu_platform.hooks import assign, wrap

# How long NIXL's progress thread waits for an event before it looks again; events end the wait.
PROGRESS_WAIT_US = 1000


def _in_main_memory(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
        args.kv_data_mem_kinds = ["DRAM"] * len(args.kv_data_ptrs)
        let_progress_threads_wait()
        original(self, args, *rest, **kwargs)

    return init


def let_progress_threads_wait() -> None:
    """Give agents that are made from now on a progress thread that waits. Imports NIXL, and so comes late."""
    # Why: NIXL's Python package fixes the wait at 0, so that each agent's thread takes a core for good, idle or not.
    # Beside a GPU that is one core of many; here two servers take both.
    module = importlib.import_module("nixl._api").nixl_agent.__module__  # of the CUDA version that is installed
    wrap(module, "nixlBind.nixlAgent", waiting_agent)


def waiting_agent(original: Any) -> Any:
    """Replacement of the class ``nixlAgent`` of NIXL's bindings: the same, with a wait in its configuration."""

    @functools.wraps(original, updated=())
    def agent(name: str, config: Any) -> Any:
        config.pthrDelay = PROGRESS_WAIT_US
        return original(name, config)

    return agent


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
