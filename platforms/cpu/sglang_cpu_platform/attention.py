"""Attention in plain torch that computes the new queries only.

SGLang's ``torch_native`` backend pads the queries of a request with a cached prefix to the whole context, computes
attention for all of them and drops the padding: 64 new tokens after 8,000 cached ones took 10 s. Here a query block
attends to the keys up to its own end, under a causal mask aligned to the lower right corner.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_cpu_platform.hooks import resolve, wrap

BACKEND_MODULE = "sglang.srt.layers.attention.torch_native_backend"

# Bounds the scores of one block to heads x 256 x context, and skips the keys after the block: 67 MB for 8 heads
# over 8,000 tokens in fp32.
QUERY_BLOCK_TOKENS = 256
# A pool that is not crowded gives a request two or three runs: the prefix that was loaded, what was new, the last page.
MOST_RUNS = 8


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
    scaling = width**-0.5 if scaling is None else scaling
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
        hidden = _hidden(end - start, groups) if causal and end - start > 1 else None
        result = _attend_block(block, key[:, :seen], value[:, :seen], hidden, scaling)
        result = result.view(kv_heads, groups, end - start, value_width).permute(2, 0, 1, 3)
        output[start:end] = result.reshape(end - start, heads, value_width)
    return output


def _hidden(queries: int, groups: int) -> torch.Tensor:
    """``[groups * queries, queries]``: True where a query must not see a key, of the last ``queries`` keys."""
    return torch.ones(queries, queries, dtype=torch.bool).triu(diagonal=1).repeat(groups, 1)


def _attend_block(
    rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention of ``rows [kv_heads, rows, width]`` over all keys, without those of the last that are ``hidden``.

    torch's fused kernel is the faster one for blocks in fp32. Over 7,000 keys on one core it took 8 times as long as
    two products for a single query, and twice as long for a block in bf16.
    """
    if rows.shape[1] > 1 and rows.dtype == torch.float32:
        mask = None
        if hidden is not None:
            mask = torch.ones(rows.shape[1], key.shape[1], dtype=torch.bool)
            mask[:, key.shape[1] - hidden.shape[1] :] = ~hidden
        return scaled_dot_product_attention(rows[None], key[None], value[None], attn_mask=mask, scale=scaling)[0]
    return _products(rows, [key], [value], hidden, scaling)


def _products(
    rows: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    hidden: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attention of ``rows [kv_heads, rows, width]`` over keys that come in parts ``[kv_heads, part, width]``."""
    queries = (rows * scaling).transpose(1, 2)
    # Keys first: this product is twice as fast as the one that gives queries first.
    scores = torch.cat([torch.bmm(key, queries) for key in keys], dim=1)
    if hidden is not None:
        scores[:, scores.shape[1] - hidden.shape[1] :].masked_fill_(hidden.T, float("-inf"))
    weights = torch.split(scores.softmax(dim=1).transpose(1, 2), [value.shape[1] for value in values], dim=2)
    parts = [torch.bmm(weight, value) for weight, value in zip(weights, values, strict=True)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)


def attend_runs(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    *,
    scaling: float | None,
    causal: bool,
) -> torch.Tensor:
    """The same as ``attend`` for one block of queries, over keys and values that come in parts, in order.

    Parts are views of the pool: gathering a context of 7,000 tokens takes as long as attending to it.
    """
    queries, heads, width = query.shape
    kv_heads, value_width = values[0].shape[1:]
    groups = heads // kv_heads
    rows = query.view(queries, kv_heads, groups, width).permute(1, 2, 0, 3).reshape(kv_heads, groups * queries, width)
    hidden = _hidden(queries, groups) if causal and queries > 1 else None
    result = _products(
        rows,
        [key.to(query.dtype).transpose(0, 1) for key in keys],
        [value.to(query.dtype).transpose(0, 1) for value in values],
        hidden,
        width**-0.5 if scaling is None else scaling,
    )
    result = result.view(kv_heads, groups, queries, value_width).permute(2, 0, 1, 3)
    return result.reshape(queries, heads, value_width)


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
        rows = query[start : start + new]
        one_block = new == 1 or (new <= QUERY_BLOCK_TOKENS and query.dtype != torch.float32)
        runs = _runs(tokens) if one_block else []
        if runs:
            keys, values = [k_cache[first:end] for first, end in runs], [v_cache[first:end] for first, end in runs]
            result = attend_runs(rows, keys, values, scaling=scaling, causal=causal)
        else:
            # Some six times as fast as k_cache[tokens].
            key, value = k_cache.index_select(0, tokens), v_cache.index_select(0, tokens)
            result = attend(rows, key, value, scaling=scaling, causal=causal)
        output[start : start + new] = result
        start += new


def _runs(tokens: torch.Tensor) -> list[tuple[int, int]]:
    """Runs ``first .. end`` of consecutive slots that a context lies in; none if they are many."""
    breaks = (tokens.diff() != 1).nonzero().flatten()
    if len(breaks) >= MOST_RUNS:
        return []
    firsts = [0, *(breaks + 1).tolist()]
    lengths = [after - first for first, after in zip(firsts, [*firsts[1:], len(tokens)], strict=True)]
    return [(slot, slot + length) for slot, length in zip(tokens[firsts].tolist(), lengths, strict=True)]


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
