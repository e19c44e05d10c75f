"""The attention of the CPU platform, against a plain computation in float64."""

import pytest
import torch
from sglang_cpu_platform import attention

PREFIXES_AND_NEW = [(0, 1), (0, 7), (130, 1), (130, 300), (64, 256), (5, 700)]
GQA = (4, 2, 32, 32)
MHA = (4, 4, 16, 16)
ABSORBED_MLA = (4, 1, 48, 32)
GEOMETRY = ("heads", "kv_heads", "width", "value_width")


def plain_attention(query, key, value, scaling, queries_before):
    """One query at a time, over the keys up to its own position."""
    heads_per_key = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double(), value.double()
    output = query.new_empty(*query.shape[:2], value.shape[2])
    for row in range(query.shape[0]):
        seen = queries_before + row + 1
        for head in range(query.shape[1]):
            shared = head // heads_per_key
            scores = key[:seen, shared] @ query[row, head] * scaling
            output[row, head] = scores.softmax(dim=0) @ value[:seen, shared]
    return output


class Cache:
    """KV caches whose tokens lie scattered, with requests of the given lengths."""

    def __init__(self, lengths, kv_heads, width, value_width):
        random = torch.Generator().manual_seed(0)
        tokens = sum(lengths) + 11
        self.key = torch.randn(tokens, kv_heads, width, generator=random)
        self.value = torch.randn(tokens, kv_heads, value_width, generator=random)
        order = torch.randperm(tokens, generator=random)
        self.req_to_token = torch.zeros(len(lengths) + 1, max(lengths), dtype=torch.int32)
        for row, length in enumerate(lengths):
            taken, order = order[:length], order[length:]
            self.req_to_token[row + 1, :length] = taken

    def of(self, request):
        tokens = self.req_to_token[request]
        return self.key[tokens], self.value[tokens]


def never(*_args, **_options):
    raise AssertionError("the original of SGLang was called")


@pytest.mark.parametrize(GEOMETRY, [GQA, MHA, ABSORBED_MLA])
def test_extend_equals_plain_attention_for_each_request(heads, kv_heads, width, value_width):
    lengths = [prefix + new for prefix, new in PREFIXES_AND_NEW]
    cache = Cache(lengths, kv_heads, width, value_width)
    total_new = sum(new for _, new in PREFIXES_AND_NEW)
    query = torch.randn(total_new, heads, width, generator=torch.Generator().manual_seed(1))
    output = torch.full((total_new, heads, value_width), torch.nan)
    attention.wrap_extend(never)(
        None,
        query,
        output,
        cache.key,
        cache.value,
        cache.req_to_token,
        torch.arange(1, len(lengths) + 1),
        torch.tensor(lengths),
        torch.tensor([prefix for prefix, _ in PREFIXES_AND_NEW]),
        torch.tensor([new for _, new in PREFIXES_AND_NEW]),
        None,
        scaling=0.2,
        enable_gqa=heads != kv_heads,
        causal=True,
        is_cross_attn=False,
        sliding_window_size=None,
    )
    start = 0
    for request, (prefix, new) in enumerate(PREFIXES_AND_NEW, start=1):
        expected = plain_attention(query[start : start + new], *cache.of(request), 0.2, prefix)
        torch.testing.assert_close(output[start : start + new].double(), expected, rtol=1e-4, atol=1e-5)
        start += new


@pytest.mark.parametrize(GEOMETRY, [GQA, ABSORBED_MLA])
def test_decode_equals_plain_attention_for_each_request(heads, kv_heads, width, value_width):
    lengths = [1, 65, 300]
    cache = Cache(lengths, kv_heads, width, value_width)
    query = torch.randn(len(lengths), heads, width, generator=torch.Generator().manual_seed(1))
    output = torch.full((len(lengths), heads, value_width), torch.nan)
    attention.wrap_decode(never)(
        None,
        query,
        output,
        cache.key,
        cache.value,
        cache.req_to_token,
        torch.arange(1, len(lengths) + 1),
        torch.tensor(lengths),
        None,
        scaling=None,
        enable_gqa=heads != kv_heads,
        causal=False,
    )
    for request, length in enumerate(lengths, start=1):
        row = slice(request - 1, request)
        expected = plain_attention(query[row], *cache.of(request), width**-0.5, length - 1)
        torch.testing.assert_close(output[row].double(), expected, rtol=1e-4, atol=1e-5)


def test_extend_of_bfloat16_is_close_to_plain_attention():
    cache = Cache([200], 2, 32, 32)
    query = torch.randn(70, 4, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    key, value = (plane.bfloat16() for plane in cache.of(1))
    output = attention.attend(query, key, value, scaling=None, causal=True)
    assert output.dtype is torch.bfloat16
    expected = plain_attention(query, key, value, 32**-0.5, 130)
    torch.testing.assert_close(output.double(), expected, rtol=0.03, atol=0.03)


def test_new_queries_do_not_read_keys_after_them():
    key = torch.randn(40, 2, 16)
    value = torch.randn(40, 2, 16)
    query = torch.randn(10, 4, 16)
    before = attention.attend(query, key, value, scaling=None, causal=True)
    key[35:] = 7
    value[35:] = 7
    after = attention.attend(query, key, value, scaling=None, causal=True)
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5:], after[5:])


@pytest.mark.parametrize("options", [{"sliding_window_size": 4}, {"is_cross_attn": True}])
def test_attention_of_another_kind_goes_to_the_original(options):
    calls = []
    tensors = [torch.zeros(1)] * 9
    attention.wrap_extend(lambda *_args, **_options: calls.append("extend"))(None, *tensors, None, **options)
    attention.wrap_decode(lambda *_args, **_options: calls.append("decode"))(None, *tensors[:7], None, **options)
    assert calls == ["extend", "decode"]


def test_runs_of_consecutive_slots_are_found():
    tokens = torch.tensor([7, 8, 9, 64, 65, 3], dtype=torch.int32)
    assert attention._runs(tokens) == [(7, 10), (64, 66), (3, 4)]
    assert attention._runs(tokens[:1]) == [(7, 8)]
    assert attention._runs(torch.arange(0, 4 * attention.MOST_RUNS, 2)) == []


@pytest.mark.parametrize(GEOMETRY, [GQA, MHA, ABSORBED_MLA])
@pytest.mark.parametrize("new", [1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_context_in_a_few_runs_is_attended_to_where_it_lies(heads, kv_heads, width, value_width, new, dtype):
    cache = Cache([200], kv_heads, width, value_width)
    tokens = torch.cat([torch.arange(128, 256), torch.arange(64, 128), torch.arange(8, 16)])
    key_pool = torch.zeros(256, kv_heads, width, dtype=dtype)
    value_pool = torch.zeros(256, kv_heads, value_width, dtype=dtype)
    key, value = (plane.to(dtype) for plane in cache.of(1))
    key_pool[tokens], value_pool[tokens] = key, value
    query = torch.randn(new, heads, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    output = torch.full((new, heads, value_width), torch.nan, dtype=dtype)
    requests = [(0, 200, new)]
    attention._attend_requests(query, output, key_pool, value_pool, tokens[None], requests, None, new > 1)
    expected = plain_attention(query, key, value, width**-0.5, 200 - new)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(output.double(), expected, **tolerance)
