"""Copies between SGLang's host pools and buffers of a device that is main memory."""

import pytest
import torch
from sglang.srt.mem_cache import device_pool_info
from sglang.srt.mem_cache.pool_host import base, mha, mla
from sglang_cpu_platform import host_pools

from sglang_dualpath.reader.pool import HostPages

LAYERS = 3
PAGE_TOKENS = 4
DEVICE_TOKENS = 32
HOST_TOKENS = 64
COPIES = ("transfer_kv_direct", "transfer_kv_per_layer_direct_pf_lf", "transfer_kv_all_layer_direct_lf_pf")
LAYOUTS = ["page_first_direct", "layer_first"]


@pytest.fixture(autouse=True)
def _hooks(monkeypatch):
    """The hooks for one test: what monkeypatch sets here, it restores, whatever ``install`` puts over it."""
    monkeypatch.setattr(base.HostKVCache, "__init__", base.HostKVCache.__init__)
    monkeypatch.setattr(base, "HICACHE_HOST_MEMORY_RESERVE_BYTES", 0)
    for module in (mha, mla):
        for name in COPIES:
            monkeypatch.setattr(module, name, None, raising=False)
    host_pools.install()


def planes(*shape):
    return tuple(torch.randn(DEVICE_TOKENS, *shape) for _ in range(LAYERS))


def pointers(tensors):
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.uint64)


def capacity():
    return {
        "host_to_device_ratio": 2.0,
        "host_size": 0,
        "page_size": PAGE_TOKENS,
        "device_capacity_tokens": DEVICE_TOKENS,
        "start_layer": 0,
        "end_layer": LAYERS,
        "host_token_capacity": HOST_TOKENS,
    }


def mha_pool(layout):
    keys, values = planes(2, 8), planes(2, 8)
    buffers = device_pool_info.KVBuffers(
        k=keys,
        v=values,
        k_data_ptrs=pointers(keys),
        v_data_ptrs=pointers(values),
        layout=device_pool_info.KVBufferLayout.NHD,
    )
    info = device_pool_info.MHABufferInfo(
        buffers=buffers,
        page_size=PAGE_TOKENS,
        head_num=2,
        head_dim=8,
        v_head_dim=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return mha.MHATokenToKVPoolHost(info, layout=layout, **capacity()), (*keys, *values)


def mla_pool(layout):
    latents = planes(1, 12)
    info = device_pool_info.MLABufferInfo(
        buffers=latents,
        data_ptrs=pointers(latents),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE_TOKENS,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        kv_cache_dim=12,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return mla.MLATokenToKVPoolHost(info, layout=layout, target_layer_num=LAYERS, **capacity()), latents


def tokens_of(*pages):
    return torch.cat([torch.arange(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS) for page in pages])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make_pool", [mha_pool, mla_pool])
def test_pages_come_back_from_the_host_as_they_went(make_pool, layout):
    pool, buffers = make_pool(layout)
    originals = [buffer.clone() for buffer in buffers]
    backed_up, host, restored = tokens_of(5, 1, 2), tokens_of(9, 0, 7), tokens_of(3, 6, 4)
    pool.backup_from_device_all_layer(None, host, backed_up, "direct")
    for buffer in buffers:
        buffer.zero_()
    for layer in range(LAYERS):
        pool.load_to_device_per_layer(None, host, restored, layer, "direct")
    untouched = torch.ones(DEVICE_TOKENS, dtype=torch.bool)
    untouched[restored] = False
    for buffer, original in zip(buffers, originals, strict=True):
        assert torch.equal(buffer[restored], original[backed_up])
        assert not buffer[untouched].any()


@pytest.mark.parametrize("make_pool", [mha_pool, mla_pool])
def test_loading_one_layer_leaves_the_others(make_pool):
    pool, buffers = make_pool("page_first_direct")
    pool.backup_from_device_all_layer(None, tokens_of(0), tokens_of(0), "direct")
    for buffer in buffers:
        buffer.zero_()
    pool.load_to_device_per_layer(None, tokens_of(0), tokens_of(0), 1, "direct")
    assert [bool(buffer.any()) for buffer in buffers] == [False, True, False] * (len(buffers) // LAYERS)


def test_a_page_lies_where_the_storage_descriptors_say():
    pool, (*keys, _, _, _) = mha_pool("page_first_direct")
    pool.backup_from_device_all_layer(None, tokens_of(6), tokens_of(2), "direct")
    (key_address, _), (key_bytes, _) = pool.get_page_buffer_meta(tokens_of(6))
    page = pool.k_buffer[6]
    assert (key_address, key_bytes) == (page.data_ptr(), page.nbytes)
    assert torch.equal(page, torch.stack([key[tokens_of(2)] for key in keys]))


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct"])
@pytest.mark.parametrize("make_pool", [mha_pool, mla_pool])
def test_what_transfer_engines_are_given_of_a_pool_is_its_memory_to_the_byte(make_pool, layout):
    pool, _ = make_pool(layout)
    regions = HostPages(pool, PAGE_TOKENS).geometry.regions()
    assert regions == [(pool.kv_buffer.data_ptr(), pool.kv_buffer.nbytes)]


def test_pools_are_not_pinned():
    pool, _ = mla_pool("page_first_direct")
    assert not pool.pin_memory
    assert not pool.get_dummy_flat_data_page().is_pinned()


def test_the_reserve_is_sglangs_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.delenv(host_pools.RESERVE_ENV, raising=False)
    monkeypatch.setattr(base, "HICACHE_HOST_MEMORY_RESERVE_BYTES", 10)
    host_pools.install()
    assert base.HICACHE_HOST_MEMORY_RESERVE_BYTES == 10
    monkeypatch.setenv(host_pools.RESERVE_ENV, "4096")
    host_pools.install()
    assert base.HICACHE_HOST_MEMORY_RESERVE_BYTES == 4096


def test_a_malformed_reserve_ends_the_process_with_a_sentence(monkeypatch):
    monkeypatch.setenv(host_pools.RESERVE_ENV, "1GiB")
    with pytest.raises(SystemExit, match="whole number of bytes, got '1GiB'"):
        host_pools.reserve_bytes()
