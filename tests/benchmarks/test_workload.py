"""Prompts that agents send: the same each time, growing, new where a repetition must miss."""

from __future__ import annotations

import pytest

from benchmarks.load.traces import Shape, synthetic
from benchmarks.load.workload import Piece, Round, Trajectory, Workload, grow, shared_tokens

SHAPE = Shape(agents=3, rounds=2, contexts=(600, 700), longest_tokens=1200, appended_tokens=100, generated_tokens=10)


def test_the_same_workload_gives_the_same_ids() -> None:
    assert synthetic(SHAPE).prompt_ids(1, 1, "0") == synthetic(SHAPE).prompt_ids(1, 1, "0")


def test_another_seed_gives_other_ids() -> None:
    other = Workload("other", synthetic(SHAPE).trajectories, seed=1)
    assert synthetic(SHAPE).fill_ids(0) != other.fill_ids(0)


def test_all_ids_are_bytes() -> None:
    assert set(synthetic(SHAPE).prompt_ids(0, 1, "0")) <= set(range(256))


def test_a_round_begins_with_everything_before_and_the_recorded_reply() -> None:
    workload = synthetic(SHAPE)
    first, second = workload.prompt_ids(0, 0, "3"), workload.prompt_ids(0, 1, "3")
    assert first[: workload.trajectories[0].fill_tokens] == workload.fill_ids(0)
    assert second[: len(first)] == first
    assert len(second) == len(first) + SHAPE.generated_tokens + SHAPE.appended_tokens


def test_another_repetition_shares_the_context_and_nothing_after_it() -> None:
    workload = synthetic(SHAPE)
    context = workload.trajectories[0].fill_tokens
    one, two = workload.prompt_ids(0, 0, "0.0"), workload.prompt_ids(0, 0, "1.0")
    assert one[:context] == two[:context]
    assert one[context : context + 64] != two[context : context + 64]


def test_agents_share_nothing() -> None:
    workload = synthetic(SHAPE)
    assert workload.fill_ids(0)[:64] != workload.fill_ids(1)[:64]


def test_hits_are_whole_pages_of_what_was_stored_before() -> None:
    workload = synthetic(SHAPE)
    context = workload.trajectories[0].fill_tokens
    assert workload.hit_tokens(0, 0, 64) == context // 64 * 64
    assert workload.hit_tokens(0, 1, 64) == (context + 110) // 64 * 64


def test_the_last_token_of_a_prompt_is_never_a_hit() -> None:
    pieces = (Piece("a", 128),)
    workload = Workload("all stored", (Trajectory(pieces, (Round(pieces, 4),)),))
    assert workload.hit_tokens(0, 0, 64) == 64


def test_an_agent_with_nothing_stored_hits_nothing() -> None:
    workload = Workload("fresh", (Trajectory((), (Round((Piece("a", 500),), 4),)),))
    assert workload.hit_tokens(0, 0, 64) == 0
    assert workload.fill_ids(0) == []


def test_shared_tokens_end_where_pieces_differ_in_length() -> None:
    assert shared_tokens([Piece("a", 10), Piece("b", 5)], [Piece("a", 10), Piece("b", 3), Piece("c", 9)]) == 13
    assert shared_tokens([Piece("a", 10)], [Piece("b", 10)]) == 0


def test_the_store_holds_every_repetition_s_misses() -> None:
    workload = synthetic(SHAPE)
    one, two = workload.stored_tokens(1, 64), workload.stored_tokens(2, 64)
    new = sum(len(workload.prompt_ids(agent, 1, "0")) - workload.trajectories[agent].fill_tokens for agent in range(3))
    assert two - one >= new


def test_a_workload_without_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one round"):
        Workload("empty", (Trajectory((), ()),))


def test_grow_names_what_was_generated_apart_from_what_was_appended() -> None:
    trajectory = grow([Piece("x", 9)], agent="a", rounds=1, appended_tokens=5, generated_tokens=3)
    assert [piece.tokens for piece in trajectory.rounds[0].pieces] == [9, 3, 5]
    assert len({piece.key for piece in trajectory.rounds[0].pieces}) == 3
