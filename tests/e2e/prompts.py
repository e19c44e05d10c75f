"""The prompts of the identity tests, and what stock SGLang answers to them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.testbed.cluster import Cluster

PAGE = 64
NEW_TOKENS = 8
# Page edges; below SGLang's prefetch threshold of 256 tokens and around it; whole pages (fully cached); more than the
# 128 pages that HiCache moves in one batch.
LENGTHS = (
    1, 63, 64, 65, 127, 128, 129, 200, 255, 256, 257, 319, 320, 321, 383, 385, 512, 640, 700, 1023, 1025, 1536, 2100,
    8300,
)  # fmt: skip

Prompts = Mapping[str, Sequence[int]]
Outputs = Mapping[str, tuple[int, ...]]


def _tokens(seed: str, count: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=count)


def make_prompts() -> Prompts:
    """Prompts by name: one for each length, and families that share their first 1,000 tokens."""
    prompts = {f"length-{length}": _tokens(f"length-{length}", length) for length in LENGTHS}
    shared = _tokens("shared", 1000)
    prompts |= {f"shared-{number}": shared + _tokens(f"shared-{number}", 90 * number) for number in range(1, 7)}
    return prompts


def ask(cluster: Cluster, tokens: Sequence[int], **body: object) -> tuple[int, ...]:
    """Greedy output of one prompt through the router."""
    return cluster.generate(input_ids=tokens, max_new_tokens=NEW_TOKENS, **body).output_ids


def ask_all(cluster: Cluster, prompts: Prompts, *, at_once: int = 1, **body: object) -> Outputs:
    """Greedy outputs of all prompts, ``at_once`` in flight."""
    with ThreadPoolExecutor(at_once) as pool:
        answers = pool.map(lambda tokens: ask(cluster, tokens, **body), prompts.values())
        return dict(zip(prompts, answers, strict=True))


def differences(got: Outputs, expected: Outputs) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Where outputs differ from what was expected, by name: (got, expected)."""
    return {name: (ids, expected[name]) for name, ids in got.items() if ids != expected[name]}
