"""What agents send: prompts made of pieces whose token ids follow from their names, so that they need not be stored.

An agent's round i+1 sends everything before, the ids that the trace says were generated, and newly appended ones. What
the model really answers is ignored: every system is given the same ids.

The `fill` of an agent is what storage holds before anything is measured. Pieces that are part of a fill have the same
ids in every repetition and are hits each time; all others are made anew for each repetition, so that what was computed
and written back in one repetition is not a hit in the next.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

BYTE_TOKENS = 256  # of the tiny models' vocabulary: ids below are bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """`tokens` consecutive token ids; equal keys give equal ids (a shorter one the first of them)."""

    key: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Round:
    """A measured request: its whole prompt, and how many tokens are generated, exactly."""

    pieces: tuple[Piece, ...]
    generated_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """An agent: what storage holds of it at the beginning (may be empty), and the rounds it plays."""

    fill: tuple[Piece, ...]
    rounds: tuple[Round, ...]

    @property
    def fill_tokens(self) -> int:
        return sum(piece.tokens for piece in self.fill)


def grow(fill: Sequence[Piece], *, agent: str, rounds: int, appended_tokens: int, generated_tokens: int) -> Trajectory:
    """An agent whose prompt grows each round by what the round before generated and by newly appended tokens."""
    pieces = list(fill)
    played = []
    for index in range(1, rounds + 1):
        pieces += [Piece(f"{agent}/generated/{index - 1}", generated_tokens)]
        pieces += [Piece(f"{agent}/appended/{index}", appended_tokens)]
        played.append(Round(tuple(pieces), generated_tokens))
    return Trajectory(tuple(fill), tuple(played))


def shared_tokens(first: Sequence[Piece], second: Sequence[Piece]) -> int:
    """Tokens at the front of two prompts that are surely equal."""
    shared = 0
    for mine, theirs in zip(first, second, strict=False):
        if mine.key != theirs.key:
            break
        shared += min(mine.tokens, theirs.tokens)
        if mine.tokens != theirs.tokens:
            break
    return shared


@dataclass(frozen=True)
class Workload:
    """All agents. The seed decides every token id."""

    name: str
    trajectories: tuple[Trajectory, ...]
    seed: int = 20260

    def __post_init__(self) -> None:
        if not self.trajectories or not all(trajectory.rounds for trajectory in self.trajectories):
            raise ValueError("a workload needs agents, and each agent at least one round")

    @functools.cached_property
    def _stored_keys(self) -> frozenset[str]:
        return frozenset(piece.key for trajectory in self.trajectories for piece in trajectory.fill)

    @property
    def requests(self) -> int:
        """Requests of all agents in one repetition."""
        return sum(len(trajectory.rounds) for trajectory in self.trajectories)

    @property
    def longest_tokens(self) -> int:
        """Of all prompts, with what is generated after them."""
        return max(round_.prompt_tokens + round_.generated_tokens
                   for trajectory in self.trajectories for round_ in trajectory.rounds)  # fmt: skip

    def fill_ids(self, agent: int) -> list[int]:
        """Token ids that storage holds of an agent before anything is measured."""
        return self._ids(self.trajectories[agent].fill, "")

    def prompt_ids(self, agent: int, index: int, repetition: str) -> list[int]:
        """Token ids of an agent's measured round `index` (from 0) in a repetition."""
        return self._ids(self.trajectories[agent].rounds[index].pieces, repetition)

    def hit_tokens(self, agent: int, index: int, page_tokens: int) -> int:
        """Tokens of a prompt that storage surely holds: whole pages of what was stored before. The last is computed."""
        trajectory = self.trajectories[agent]
        pieces = trajectory.rounds[index].pieces
        before = [trajectory.fill] + ([trajectory.rounds[index - 1].pieces] if index else [])
        shared = max(shared_tokens(pieces, other) for other in before)
        return min(shared, trajectory.rounds[index].prompt_tokens - 1) // page_tokens * page_tokens

    def total_hit_tokens(self, page_tokens: int) -> int:
        """`hit_tokens` of all requests of one repetition."""
        return sum(self.hit_tokens(agent, index, page_tokens)
                   for agent, trajectory in enumerate(self.trajectories)
                   for index in range(len(trajectory.rounds)))  # fmt: skip

    def stored_tokens(self, repetitions: int, page_tokens: int) -> int:
        """Tokens that a store must hold after so many repetitions, when prefill and decode servers write back.

        Of each round what was no hit, in whole pages, and two pages for generated tokens and rounding.
        """
        fills = sum(trajectory.fill_tokens for trajectory in self.trajectories)
        written = sum(
            round_.prompt_tokens + round_.generated_tokens - self.hit_tokens(agent, index, page_tokens)
            + 2 * page_tokens
            for agent, trajectory in enumerate(self.trajectories)
            for index, round_ in enumerate(trajectory.rounds)
        )  # fmt: skip
        return fills + repetitions * written

    def _ids(self, pieces: Sequence[Piece], repetition: str) -> list[int]:
        ids = bytearray()
        for piece in pieces:
            part = "" if piece.key in self._stored_keys else repetition
            ids += random.Random(f"{self.seed}/{part}/{piece.key}").randbytes(piece.tokens)
        return list(ids)  # a byte is a token id below BYTE_TOKENS
