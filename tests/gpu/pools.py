"""Rows of a device pool and the host pool that SGLang puts beside them, as one end of a hop."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from sglang.srt.mem_cache import device_pool_info
from sglang.srt.mem_cache.pool_host import mha, mla

from benchmarks.micro.fabrics import fabric
from sglang_dualpath.reader.pool import HostPages
from sglang_dualpath.transfer import Peer

Model = Literal["mha", "mla"]
Layout = Literal["page_first", "page_first_direct"]
IO_BACKENDS = {"page_first": "kernel", "page_first_direct": "direct"}
"""What copies between device and host in a layout; SGLang allows no other pairs."""
PAGE_TOKENS = 64
HOST_PAGES = 12
DEVICE_PAGES = 8
LAYERS = 3
_TYPE = torch.bfloat16
# Rows whose bytes are a multiple of 128, as SGLang's copy kernels want them: 8 heads of 64, and DeepSeek's latent.
_HEADS, _WIDTH = 8, 64
_LATENT, _ROTARY = 512, 64


class PoolEnd:
    """One process's side: pools are made anew by `use`, the transfer engine stays.

    Slots number pages of the host pool, pages those of the device pool.
    """

    def __init__(self, engine: str, device: str) -> None:
        self._device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        self._transport: Any = fabric(engine)("127.0.0.1").transport
        self._pool: Any = None

    def use(self, model: Model, layout: Layout) -> None:
        """Begin with other pools; SGLang's one is pinned and registered with the transfer engine."""
        self.close()
        self._io_backend = IO_BACKENDS[layout]
        make = {"mha": self._mha_pool, "mla": self._mla_pool}[model]
        self._pool = make(layout)
        self._pages = HostPages(self._pool, PAGE_TOKENS)
        self._transport.register(self._pages.geometry)

    def close(self) -> None:
        """Give up the pools, if there are any."""
        if self._pool is not None:
            self._transport.close()
            self._pool.destroy()
            self._pool = None

    def peer(self) -> Peer:
        return Peer(self._transport.session, self._transport.metadata, self._pages.geometry)

    def is_pinned(self) -> bool:
        """What CUDA says of the host pool's memory, whatever the pool was asked for."""
        return bool(self._pool.kv_buffer.is_pinned())

    def push(self, peer: Peer, source_slots: Sequence[int], target_slots: Sequence[int]) -> None:
        self._transport.push(peer, source_slots, target_slots)

    def fill(self, seed: int) -> None:
        """Other bytes in every page of both pools."""
        generator = torch.Generator().manual_seed(seed)
        for rows in self._rows:
            noise = torch.randint(0, 256, (rows.nbytes,), dtype=torch.uint8, generator=generator)
            rows.copy_(noise.view(_TYPE).reshape(rows.shape))
        self._synchronize()
        for plane in self._pages.planes:
            size_bytes = self._pages.slots * plane.page_bytes
            noise = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, generator=generator)
            for slot in range(self._pages.slots):
                piece = noise[slot * plane.page_bytes : (slot + 1) * plane.page_bytes].numpy().tobytes()
                ctypes.memmove(plane.base + slot * plane.stride_bytes, piece, len(piece))

    def host_digests(self) -> list[str]:
        """Of every host page, read where transfer engines read and write it."""
        return [
            _digest(
                ctypes.string_at(plane.base + slot * plane.stride_bytes, plane.page_bytes)
                for plane in self._pages.planes
            )
            for slot in range(self._pages.slots)
        ]

    def device_digests(self) -> list[str]:
        """Of every page of the device pool, all layers."""
        self._synchronize()
        rows = [layer.cpu().view(torch.uint8).numpy() for layer in self._rows]
        spans = [slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS) for page in range(DEVICE_PAGES)]
        return [_digest(layer[span].tobytes() for layer in rows) for span in spans]

    def backup(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Copy device pages to host slots with SGLang's IO backend of this layout."""
        host, device = self._pages.indices(slots), self._pages.indices(pages)
        # SGLang's write-back kernel for this layout, where it has one, takes the host's indices from main memory.
        staged = self._io_backend == "kernel" and self._pool.can_use_write_back_jit
        if self._io_backend == "kernel":
            host, device = host if staged else host.to(self._device), device.to(self._device)
        self._pool.backup_from_device_all_layer(None, host, device, self._io_backend)
        self._synchronize()

    def load(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        """Copy host slots to device pages, layer by layer, with SGLang's IO backend of this layout."""
        host, device = self._pages.indices(slots), self._pages.indices(pages)
        if self._io_backend == "kernel":
            host, device = host.to(self._device), device.to(self._device)
        for layer in range(LAYERS):
            self._pool.load_to_device_per_layer(None, host, device, layer, self._io_backend)
        self._synchronize()

    def _mha_pool(self, layout: Layout) -> Any:
        keys, values = (self._layers(_HEADS, _WIDTH) for _ in range(2))
        self._rows = (*keys, *values)
        buffers = device_pool_info.KVBuffers(
            k=keys,
            v=values,
            k_data_ptrs=self._pointers(keys),
            v_data_ptrs=self._pointers(values),
            layout=device_pool_info.KVBufferLayout.NHD,
        )
        info = device_pool_info.MHABufferInfo(
            buffers=buffers,
            page_size=PAGE_TOKENS,
            head_num=_HEADS,
            head_dim=_WIDTH,
            v_head_dim=_WIDTH,
            dtype=_TYPE,
            device=self._device,
        )
        return mha.MHATokenToKVPoolHost(info, layout=layout, **self._capacity())

    def _mla_pool(self, layout: Layout) -> Any:
        self._rows = self._layers(1, _LATENT + _ROTARY)
        info = device_pool_info.MLABufferInfo(
            buffers=self._rows,
            data_ptrs=self._pointers(self._rows),
            layer_indices=tuple(range(LAYERS)),
            device_layer_num=LAYERS,
            page_size=PAGE_TOKENS,
            kv_lora_rank=_LATENT,
            qk_rope_head_dim=_ROTARY,
            kv_cache_dim=_LATENT + _ROTARY,
            dtype=_TYPE,
            device=self._device,
        )
        return mla.MLATokenToKVPoolHost(info, layout=layout, target_layer_num=LAYERS, **self._capacity())

    def _capacity(self) -> dict[str, Any]:
        return {
            "host_to_device_ratio": 1.0,
            "host_size": 0,
            "page_size": PAGE_TOKENS,
            "pin_memory": True,
            "device_capacity_tokens": DEVICE_PAGES * PAGE_TOKENS,
            "start_layer": 0,
            "end_layer": LAYERS,
            "host_token_capacity": HOST_PAGES * PAGE_TOKENS,
        }

    def _layers(self, *shape: int) -> tuple[torch.Tensor, ...]:
        tokens = DEVICE_PAGES * PAGE_TOKENS
        return tuple(torch.zeros((tokens, *shape), dtype=_TYPE, device=self._device) for _ in range(LAYERS))

    def _pointers(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        addresses = [tensor.data_ptr() for tensor in tensors]
        return torch.tensor(addresses, dtype=torch.uint64, device=self._device)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _digest(pieces: Any) -> str:
    found = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()
