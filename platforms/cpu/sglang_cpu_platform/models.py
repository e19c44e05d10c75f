"""Tiny models with random weights, made on the spot: ``python -m sglang_cpu_platform.models --kind gqa --out DIR``.

The weights are wide (standard deviation 0.3), so that the output of a model depends on all of its context: with the
usual 0.02 a random model repeats one token whatever it reads, and a wrong KV page would not show.

How surely it shows, as counted with the fp32 GQA model and random prompts of 3,000 tokens: another page of 64 tokens
changed the first 12 generated tokens in 22 of 24 cases and the first 32 in 24 of 24; one other token changed the first
32 in 17 of 24. A comparison of outputs should therefore generate 32 tokens, and it finds wrong pages, not single
tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

Kind = Literal["gqa", "mla"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

VOCABULARY = 512
"""256 bytes, the end of text, and letter pairs that no text encodes to but that a model may produce."""
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 256
INITIALIZER_RANGE = 0.3
MAX_CONTEXT_TOKENS = 32_768
MLA_ROPE_WIDTH = 64
# Absorbed attention costs heads x latent width for every pair of tokens: more would make long prompts take a minute.
MLA_HEADS = 4


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Shape of the KV cache of a model.

    ``kv_heads`` is 1 for MLA, and ``head_width`` then the width of the latent, rotary part included.
    """

    kind: Kind
    dtype: torch.dtype
    layers: int
    kv_heads: int
    head_width: int
    queries_per_kv_head: int = 2
    """Query heads that share a KV head, 1 being plain multi-head attention. MLA has ``MLA_HEADS`` always."""

    @property
    def layer_kv_bytes(self) -> int:
        """KV bytes of one token in one layer."""
        planes = 2 if self.kind == "gqa" else 1
        return planes * self.kv_heads * self.head_width * self.dtype.itemsize

    @property
    def kv_bytes(self) -> int:
        """KV bytes of one token."""
        return self.layers * self.layer_kv_bytes


def default_geometry(kind: Kind, dtype: torch.dtype) -> Geometry:
    """bf16: 16 KB (GQA) or 4 KB (MLA) of KV per token; fp32 is for identity tests and small: 2 KB and 4 KB."""
    if kind == "mla":
        layers = 8 if dtype is torch.bfloat16 else 4
        return Geometry(kind=kind, dtype=dtype, layers=layers, kv_heads=1, head_width=256)
    if dtype is torch.bfloat16:
        return Geometry(kind=kind, dtype=dtype, layers=8, kv_heads=8, head_width=64)
    return Geometry(kind=kind, dtype=dtype, layers=4, kv_heads=2, head_width=32)


def geometry_of(kind: Kind, dtype: torch.dtype, kv_bytes: int | None = None) -> Geometry:
    """The default geometry, with as many layers as ``kv_bytes`` per token take.

    Raises:
        ValueError: ``kv_bytes`` is not a positive multiple of the bytes of one layer.
    """
    geometry = default_geometry(kind, dtype)
    if kv_bytes is None:
        return geometry
    layers, rest = divmod(kv_bytes, geometry.layer_kv_bytes)
    if rest or layers < 1:
        raise ValueError(f"KV bytes must be a positive multiple of {geometry.layer_kv_bytes} here, got {kv_bytes}.")
    return Geometry(kind=kind, dtype=dtype, layers=layers, kv_heads=geometry.kv_heads, head_width=geometry.head_width)


def _common_config(geometry: Geometry, hidden: int) -> dict[str, Any]:
    return {
        "bos_token_id": None,
        "dtype": str(geometry.dtype).removeprefix("torch."),
        "eos_token_id": END_OF_TEXT_ID,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": INITIALIZER_RANGE,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": MAX_CONTEXT_TOKENS,
        "num_hidden_layers": geometry.layers,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    }


def _gqa_config(geometry: Geometry) -> dict[str, Any]:
    heads = geometry.queries_per_kv_head * geometry.kv_heads
    return _common_config(geometry, hidden=256) | {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": geometry.head_width,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_key_value_heads": geometry.kv_heads,
        "rope_theta": 1_000_000.0,
    }


def _mla_config(geometry: Geometry) -> dict[str, Any]:
    return _common_config(geometry, hidden=256) | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        # As many dense layers as there are layers: no mixture of experts, whose kernels need a GPU.
        "first_k_dense_replace": geometry.layers,
        "kv_lora_rank": geometry.head_width - MLA_ROPE_WIDTH,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 64,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": MLA_HEADS,
        "num_experts_per_tok": 2,
        "num_key_value_heads": MLA_HEADS,
        "q_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": MLA_ROPE_WIDTH,
        # SGLang's DeepSeek model always computes yarn's scaling, so it has to be given.
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 8.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": MAX_CONTEXT_TOKENS // 8,
            "type": "yarn",
        },
        "rope_theta": 10_000.0,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "v_head_dim": 64,
    }


Shapes = dict[str, tuple[int, ...]]


def _gqa_attention(config: dict[str, Any]) -> Shapes:
    hidden, width = config["hidden_size"], config["head_dim"]
    queries, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    return {
        "q_proj": (queries, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, queries),
        "q_norm": (width,),
        "k_norm": (width,),
    }


def _mla_attention(config: dict[str, Any]) -> Shapes:
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    plain, rotary, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    return {
        "q_a_proj": (config["q_lora_rank"], hidden),
        "q_a_layernorm": (config["q_lora_rank"],),
        "q_b_proj": (heads * (plain + rotary), config["q_lora_rank"]),
        "kv_a_proj_with_mqa": (latent + rotary, hidden),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (heads * (plain + value), latent),
        "o_proj": (hidden, heads * value),
    }


def _shapes(kind: Kind, config: dict[str, Any]) -> Shapes:
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    attention = _gqa_attention(config) if kind == "gqa" else _mla_attention(config)
    shapes: Shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, intermediate)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (VOCABULARY, hidden)
    return shapes


def _weights(shapes: Shapes, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:  # a norm
            weights[name] = torch.ones(shape, dtype=dtype)
        else:
            weights[name] = (torch.randn(shape, generator=generator) * INITIALIZER_RANGE).to(dtype)
    return weights


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers use for each byte, the scheme of GPT-2's ``encoder.py``."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    substitutes = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


def _tokenizer() -> dict[str, Any]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = itertools.islice((a + b for a in letters for b in letters), VOCABULARY - END_OF_TEXT_ID - 1)
    vocabulary = [*_byte_characters(), END_OF_TEXT, *pairs]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": END_OF_TEXT_ID,
                "content": END_OF_TEXT,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(vocabulary)},
            "merges": [],
        },
    }


def make_model(out: Path, geometry: Geometry, seed: int = 0) -> None:
    """Write config, weights and tokenizer of a model to the directory ``out``, which is created if missing.

    The files are equal, byte by byte, for equal arguments.
    """
    config = _gqa_config(geometry) if geometry.kind == "gqa" else _mla_config(geometry)
    out.mkdir(parents=True, exist_ok=True)
    weights = _weights(_shapes(geometry.kind, config), geometry.dtype, seed)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    documents = {
        "config.json": config,
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TEXT,
            "model_max_length": MAX_CONTEXT_TOKENS,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "generation_config.json": {"eos_token_id": END_OF_TEXT_ID},
    }
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(prog="python -m sglang_cpu_platform.models", description=__doc__)
    parser.add_argument("--kind", choices=["gqa", "mla"], required=True)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--kv-bytes", type=int, help="KV bytes per token; sets the number of layers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        geometry = geometry_of(options.kind, DTYPES[options.dtype], options.kv_bytes)
    except ValueError as error:
        parser.error(str(error))
    make_model(options.out, geometry, options.seed)
    print(f"{options.out}: {geometry.layers} layers, {geometry.kv_bytes} bytes of KV per token")


if __name__ == "__main__":
    main()
