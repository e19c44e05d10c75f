"""Agents that play rounds over growing contexts, and what each round cost.

An agent's prompt in a round is its whole previous prompt, the tokens generated then, and newly appended ones. All of it
is recorded, so that another system can be given exactly the same prompts. Between rounds caches are dropped, so that
what was seen before has to be loaded: from storage, or in the last round from the decode server's memory.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal

from benchmarks.testbed import Cluster, Generation, difference, metric_sum
from benchmarks.testbed.metrics import Metrics
from benchmarks.testbed.network import LinkBytes, NetworkName

RoundKind = Literal["fresh", "storage", "decode_memory"]
PromptIds = tuple[int, ...]

_BYTE_TOKENS = 256  # of the tiny models' vocabulary: ids below are bytes


@dataclass(frozen=True)
class Workload:
    """Sizes in tokens. Contexts run from `first_tokens` to `longest_tokens`; the seed decides the tokens."""

    agents: int = 3
    rounds: int = 5
    first_tokens: int = 2000
    appended_tokens: int = 1184
    generated_tokens: int = 16
    seed: int = 20260

    def __post_init__(self) -> None:
        if self.agents < 1 or self.rounds < 3:
            raise ValueError("at least one agent and three rounds are needed: fresh, from storage, from decode memory")

    @property
    def longest_tokens(self) -> int:
        return self.first_tokens + (self.rounds - 1) * (self.appended_tokens + self.generated_tokens)

    def kind(self, index: int) -> RoundKind:
        """Where the hits of round `index` (from 0) come from."""
        if index == 0:
            return "fresh"
        return "decode_memory" if index == self.rounds - 1 else "storage"

    def appended(self, agent: int, index: int) -> PromptIds:
        """New tokens of an agent in a round: the same ones each time they are asked for."""
        source = random.Random(f"{self.seed}/{agent}/{index}")
        count = self.first_tokens if index == 0 else self.appended_tokens
        return tuple(source.randrange(_BYTE_TOKENS) for _ in range(count))


@dataclass(frozen=True)
class Traffic:
    """Bytes of one round. `link_*` are None without shaped networks; the others are 0 on stock servers.

    `read_*` and `hopped` are the servers' own counters of payload, `link_*` what the links of a node carried: received
    from storage by each side, and received by the prefill node on the compute network, which is what was hopped.
    """

    read_prefill: int
    read_decode: int
    hopped: int
    link_prefill: int | None
    link_decode: int | None
    link_hopped: int | None


@dataclass(frozen=True)
class Round:
    """One round of all agents, in the agents' order. `wall_s` ends with the last token, `write_back_s` comes after."""

    kind: RoundKind
    prompts: tuple[PromptIds, ...]
    generations: tuple[Generation, ...]
    traffic: Traffic
    wall_s: float
    write_back_s: float

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens that the prefill server did not compute."""
        return sum(generation.cached_tokens for generation in self.generations)

    @property
    def new_tokens(self) -> int:
        return self.prompt_tokens - self.hit_tokens

    @property
    def mean_ttft_s(self) -> float:
        return sum(generation.ttft_s for generation in self.generations) / len(self.generations)

    @property
    def outputs(self) -> tuple[PromptIds, ...]:
        return tuple(generation.output_ids for generation in self.generations)


@dataclass(frozen=True)
class _Reading:
    """All counters at one moment."""

    metrics: Mapping[str, Metrics]
    links: LinkBytes

    @staticmethod
    def take(cluster: Cluster) -> _Reading:
        return _Reading({name: cluster.metrics(name) for name in cluster.names}, cluster.link_bytes())

    def traffic_since(self, before: _Reading) -> Traffic:
        def added(server: str, name: str, **labels: str) -> int:
            return round(metric_sum(difference(self.metrics[server], before.metrics[server]), name, **labels))

        def carried(node: str, network: NetworkName) -> int | None:
            if not self.links:
                return None
            return self.links[node, network, "rx"] - before.links[node, network, "rx"]

        return Traffic(
            read_prefill=added("prefill", "sglang_dualpath_read_bytes_total"),
            read_decode=added("decode", "sglang_dualpath_read_bytes_total"),
            hopped=added("decode", "sglang_dualpath_pushed_bytes_total"),
            link_prefill=carried("prefill", "storage"),
            link_decode=carried("decode", "storage"),
            link_hopped=carried("prefill", "compute"),
        )


def play(
    cluster: Cluster,
    workload: Workload,
    *,
    recorded: Sequence[Sequence[PromptIds]] | None = None,
    on_round: Callable[[int, RoundKind], None] = lambda index, kind: None,
    on_request: Callable[[], None] = lambda: None,
    on_write_back: Callable[[], None] = lambda: None,
) -> list[Round]:
    """Play all rounds on a cluster whose caches and store are empty; the agents of a round send at the same time.

    `recorded` gives the prompts of each round instead of this run's own outputs. The callbacks tell a user where it
    stands: a round begins, a request has ended, written-back pages are waited for. Raises RequestError when one fails.
    """
    rounds: list[Round] = []
    for index in range(workload.rounds):
        kind = workload.kind(index)
        on_round(index, kind)
        prompts = tuple(recorded[index]) if recorded is not None else _prompts(workload, index, rounds)
        before = _Reading.take(cluster)
        start = time.perf_counter()
        generations = _send(cluster, prompts, workload.generated_tokens, on_request)
        wall_s = time.perf_counter() - start
        on_write_back()
        start = time.perf_counter()
        # The last round but one keeps what the decode server holds. A flush ends when all pages are written back.
        cluster.flush(decode=index + 1 == workload.rounds or workload.kind(index + 1) != "decode_memory")
        write_back_s = time.perf_counter() - start
        traffic = _Reading.take(cluster).traffic_since(before)
        rounds.append(Round(kind, prompts, generations, traffic, wall_s, write_back_s))
    return rounds


def _prompts(workload: Workload, index: int, rounds: Sequence[Round]) -> tuple[PromptIds, ...]:
    if index == 0:
        return tuple(workload.appended(agent, 0) for agent in range(workload.agents))
    last = rounds[-1]
    return tuple(
        last.prompts[agent] + last.outputs[agent] + workload.appended(agent, index) for agent in range(workload.agents)
    )


def _send(
    cluster: Cluster, prompts: Sequence[PromptIds], generated_tokens: int, on_request: Callable[[], None]
) -> tuple[Generation, ...]:
    """All prompts at once; their results in order. The first failure is raised without waiting for the others."""
    executor = ThreadPoolExecutor(max_workers=len(prompts))
    try:
        futures = [
            executor.submit(cluster.generate, input_ids=prompt, max_new_tokens=generated_tokens, stream=True)
            for prompt in prompts
        ]
        for future in futures:
            future.add_done_callback(lambda _: on_request())
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future.done():
                future.result()
        return tuple(future.result() for future in futures)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
