"""Attention in plain torch that computes the new queries only.

SGLang's ``torch_native`` backend pads the queries of a request with a cached prefix to the whole context, computes
attention for all of them and drops the padding: 64 new tokens after 8,000 cached ones took 10 s. Here a query block
attends to the keys up to its own end, under a causal mask aligned to the lower right corner.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_cpu_platform.hooks import resolve, wrap

BACKEND_MODULE = "sglang.srt.layers.attention.torch_native_backend"

# Bounds the scores of one block to heads x 256 x context, and skips the keys after the block: 67 MB for 8 heads
# over 8,000 tokens in fp32.
QUERY_BLOCK_TOKENS = 256


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float | None, causal: bool
) -> torch.Tensor:
    """Attention of the last queries of one sequence over all of its keys.

    Args:
        query: ``[queries, heads, width]``, the last ``queries`` positions of the sequence.
        key: ``[keys, kv_heads, width]``, ``heads`` being a multiple of ``kv_heads``.
        value: ``[keys, kv_heads, value_width]``.
        scaling: Factor of the scores, ``width ** -0.5`` if None.
        causal: Query ``i`` sees the keys ``0 .. keys - queries + i``; otherwise all of them.

    Returns:
        ``[queries, heads, value_width]`` in the dtype of the query.
    """
    queries, heads, width = query.shape
    keys, kv_heads, value_width = value.shape
    groups = heads // kv_heads
    # The query heads that share a KV head become further rows of that head, which spares copies of the keys.
    rows = query.view(queries, kv_heads, groups, width).permute(1, 2, 0, 3)
    key = key.to(query.dtype).transpose(0, 1)
    value = value.to(query.dtype).transpose(0, 1)
    output = query.new_empty(queries, heads, value_width)
    for start in range(0, queries, QUERY_BLOCK_TOKENS):
        end = min(start + QUERY_BLOCK_TOKENS, queries)
        block = rows[:, :, start:end].reshape(kv_heads, groups * (end - start), width)
        seen = keys - queries + end if causal else keys
        mask = _lower_right_mask(end - start, seen).repeat(groups, 1) if causal and end - start > 1 else None
        result = scaled_dot_product_attention(
            block.unsqueeze(0), key[None, :, :seen], value[None, :, :seen], attn_mask=mask, scale=scaling
        )
        result = result.view(kv_heads, groups, end - start, value_width).permute(2, 0, 1, 3)
        output[start:end] = result.reshape(end - start, heads, value_width)
    return output


def _lower_right_mask(queries: int, keys: int) -> torch.Tensor:
    """``[queries, keys]``: True where the key is not after the query, the last of both being the same position."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(diagonal=keys - queries)


def _is_plain(options: dict[str, Any], encoder_lens: object) -> bool:
    window = options.get("sliding_window_size")
    return encoder_lens is None and not options.get("is_cross_attn") and (window is None or window < 0)


def _attend_requests(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    requests: Iterable[tuple[int, int, int]],
    scaling: float | None,
    causal: bool,
) -> None:
    """Write the rows of ``output``, request by request: row in ``req_to_token``, tokens of context, queries."""
    start = 0
    for request, context, new in requests:
        tokens = req_to_token[request, :context]
        output[start : start + new] = attend(
            query[start : start + new], k_cache[tokens], v_cache[tokens], scaling=scaling, causal=causal
        )
        start += new


def wrap_extend(original: Any) -> Any:
    """Replacement of ``TorchNativeAttnBackend._run_sdpa_forward_extend``; windows and encoders go to the original."""

    @functools.wraps(original)
    def extend(
        self: Any,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        if not _is_plain(options, encoder_lens):
            return original(
                self,
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                extend_prefix_lens,
                extend_seq_lens,
                encoder_lens,
                **options,
            )
        lengths = zip(req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), strict=True)
        causal = bool(options.get("causal"))
        _attend_requests(query, output, k_cache, v_cache, req_to_token, lengths, options.get("scaling"), causal)
        return output

    return extend


def wrap_decode(original: Any) -> Any:
    """Replacement of ``TorchNativeAttnBackend._run_sdpa_forward_decode``; windows and encoders go to the original."""

    @functools.wraps(original)
    def decode(
        self: Any,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        if not _is_plain(options, encoder_lens):
            return original(
                self,
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                encoder_lens,
                **options,
            )
        lengths = ((*one, 1) for one in zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True))
        _attend_requests(query, output, k_cache, v_cache, req_to_token, lengths, options.get("scaling"), causal=False)
        return output

    return decode


def install() -> None:
    """Hook the torch-native attention backend and give it absorbed MLA.

    Raises:
        SystemExit: SGLang lacks a symbol that is replaced.
    """
    # Why: linear instead of quadratic work for a short extend after a long cached prefix.
    wrap(BACKEND_MODULE, "TorchNativeAttnBackend._run_sdpa_forward_extend", wrap_extend)
    # Why: grouped heads without copying the keys once per query head.
    wrap(BACKEND_MODULE, "TorchNativeAttnBackend._run_sdpa_forward_decode", wrap_decode)
    # Why: SGLang knows no MLA method for this backend and would take the one of its Triton backend, which computes
    # the first extend unabsorbed. Absorbed, one method reads the latent cache for extend and decode alike.
    module = "sglang.srt.models.deepseek_common.attention_backend_handler"
    registry, register, _ = resolve(module, "AttentionBackendRegistry.register")
    methods = "sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods"
    absorbed = resolve(methods, "AttnForwardMethod.MLA")[2]
    getattr(registry, register)("torch_native", lambda attn, forward_batch: absorbed)
