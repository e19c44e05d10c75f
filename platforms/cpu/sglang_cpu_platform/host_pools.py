"""Host pools without pinned memory, and the copies between them and the "device" pool in plain torch.

The copies have the signatures of the ``sgl_kernel`` functions that SGLang imports on GPUs only. Page indices are
token indices divided by the page size: a page's tokens are consecutive in both pools, and the index lists name all
tokens of every page in order.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch

from sglang_cpu_platform.hooks import assign, resolve, wrap

RESERVE_ENV = "SGLANG_CPU_PLATFORM_HOST_RESERVE_BYTES"


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy tokens between two lists of layers, each ``[tokens, ...]`` (layout ``layer_first``)."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """Load one layer: host ``[pages, layers, page_size, ...]`` to device ``[tokens, ...]``, one pair per plane."""
    pages, device_pages = _pages(src_indices, page_size), _pages(dst_indices, page_size)
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        rows = source.select(1, layer_id).index_select(0, pages)
        _by_page(target, page_size).index_copy_(0, device_pages, rows.view(-1, page_size, *target.shape[1:]))


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[torch.Tensor],
    dst_ptrs: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Back up all layers: device ``[tokens, ...]`` to host ``[pages, layers, page_size, ...]``.

    ``src_ptrs`` holds the layers of the first plane, then those of the second (K and V; MLA has one plane).
    """
    pages, device_pages = _pages(dst_indices, page_size), _pages(src_indices, page_size)
    layers = len(src_ptrs) // len(dst_ptrs)
    for plane, target in enumerate(dst_ptrs):
        for layer in range(layers):
            rows = _by_page(src_ptrs[plane * layers + layer], page_size).index_select(0, device_pages)
            target.select(1, layer).index_copy_(0, pages, rows.view(-1, *target.shape[2:]))


def _by_page(tokens: torch.Tensor, page_size: int) -> torch.Tensor:
    """A view of the whole pages of a device pool ``[tokens, ...]``: whole pages are copied twice as fast as tokens."""
    pages = tokens.shape[0] // page_size
    return tokens[: pages * page_size].view(pages, page_size, *tokens.shape[1:])


def _pages(indices: torch.Tensor, page_size: int) -> torch.Tensor:
    return indices.view(-1, page_size)[:, 0] // page_size


def _without_pinning(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["pin_memory"] = False
        original(self, *args, **kwargs)

    return init


def reserve_bytes() -> int | None:
    """Host memory that pools must leave free according to the environment, None if it does not say.

    Raises:
        SystemExit: The variable is not a whole number of bytes.
    """
    text = os.environ.get(RESERVE_ENV)
    if text is None:
        return None
    if not text.isdigit():
        raise SystemExit(f"{RESERVE_ENV} must be a whole number of bytes, got {text!r}.")
    return int(text)


def install() -> None:
    """Hook SGLang's host pools.

    Raises:
        SystemExit: SGLang lacks a symbol that is replaced, or the environment variable is malformed.
    """
    base = "sglang.srt.mem_cache.pool_host.base"
    # Why: pinning is a CUDA call. Pools then take their memory from their allocator, unregistered.
    wrap(base, "HostKVCache.__init__", _without_pinning)
    # Why: SGLang defines these names on GPUs only; the pools call them for the I/O backend "direct".
    for name in ("mha", "mla"):
        module = f"sglang.srt.mem_cache.pool_host.{name}"
        pools, _, _ = resolve(module, "HostKVCache")
        for copy in (transfer_kv_direct, transfer_kv_per_layer_direct_pf_lf, transfer_kv_all_layer_direct_lf_pf):
            setattr(pools, copy.__name__, copy)
    # Why: SGLang leaves 10 GiB of the machine free per pool, so few servers fit on one small machine. Lowered only on
    # demand, for pools whose sizes are known to fit.
    reserve = reserve_bytes()
    if reserve is not None:
        assign(base, "HICACHE_HOST_MEMORY_RESERVE_BYTES", reserve)
