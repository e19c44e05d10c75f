"""The tiny models that servers of the testbed run, and what their KV cache takes."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE_TOKENS = 64
KV_BYTES_PER_TOKEN = 16 * 1024  # of the fixed setting, per token and engine

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def element_type(model: Path) -> str:
    """Type of the model's numbers, as its config.json names it: "float32" or "bfloat16"."""
    config: Mapping[str, Any] = json.loads((model / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def kv_bytes_per_token(model: Path) -> int:
    """KV bytes of one token over all layers (tensor parallel 1), from the model's config.json.

    GQA: layers x 2 x KV heads x head width x element bytes. MLA: layers x (latent + rotary width) x element bytes.
    """
    config: Mapping[str, Any] = json.loads((model / "config.json").read_text())
    element_bytes = _ELEMENT_BYTES[element_type(model)]
    layers = int(config["num_hidden_layers"])
    if "kv_lora_rank" in config:
        return layers * (int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])) * element_bytes
    return layers * 2 * int(config["num_key_value_heads"]) * int(config["head_dim"]) * element_bytes


def identity_model(directory: Path) -> Path:
    """An fp32 GQA model of 16 KB of KV per token in `directory`, made when it is not there yet.

    4 layers x 2 x 8 KV heads x 64 x 4 bytes = 16,384 bytes. In fp32 greedy output does not depend on how a prompt was
    split between cached and computed tokens, which in bf16 rounding would change.
    """
    return _made(directory / "gqa-float32-16k", kind="gqa", dtype="float32", layers=4, kv_heads=8, head_width=64)


def small_identity_model(directory: Path) -> Path:
    """A smaller fp32 GQA model for tests of outputs: 4 layers x 2 x 2 KV heads x 32 x 4 bytes = 2 KB a token."""
    return _made(directory / "gqa-float32-2k", kind="gqa", dtype="float32", layers=4, kv_heads=2, head_width=32)


def identity_mla_model(directory: Path) -> Path:
    """An fp32 MLA model for tests of outputs: 4 layers x (64 latent + 64 rotary) x 4 bytes = 2 KB a token."""
    return _made(directory / "mla-float32-2k", kind="mla", dtype="float32", layers=4, kv_heads=1, head_width=128)


def cuda_identity_model(directory: Path) -> Path:
    """A bf16 GQA model for tests of outputs on CUDA: 4 layers x 2 x 8 KV heads x 64 x 2 bytes = 8 KB a token.

    Rows of 8 x 64 x 2 = 1 KB in each layer are a multiple of the 128 bytes that SGLang's copy kernels move at a time.
    """
    return _made(directory / "gqa-bfloat16-8k", kind="gqa", dtype="bfloat16", layers=4, kv_heads=8, head_width=64)


def speed_model(directory: Path) -> Path:
    """The bf16 model of the fixed setting: 8 layers x 2 x 1 KV head x 512 x 2 bytes = 16 KB of KV per token.

    What a run computes is attention over whole contexts, on cores that also read and push. So there are as many query
    heads as KV heads, since shared ones would multiply just that; and one wide head, as an MLA model's latent, because
    scores of a context are there once for each head.
    """
    sizes = {"layers": 8, "kv_heads": 1, "head_width": 512, "queries_per_kv_head": 1}
    return _made(directory / "mha-bfloat16-16k-wide", kind="gqa", dtype="bfloat16", **sizes)


def _made(path: Path, *, kind: Any, dtype: str, **sizes: int) -> Path:
    if (path / "model.safetensors").exists():
        return path
    import torch
    from sglang_cpu_platform.models import Geometry, make_model

    geometry = Geometry(kind=kind, dtype=getattr(torch, dtype), **sizes)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and then renamed: an interrupted run leaves no half a model behind.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        make_model(unfinished, geometry)
        unfinished.chmod(0o755)
        unfinished.rename(path)
    except OSError:
        if not path.exists():  # else another run was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path
