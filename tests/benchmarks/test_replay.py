"""Requests against a server that speaks the streaming format."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.load.replay import make_request, play_offline, play_poisson, poisson_arrivals, requests_of
from benchmarks.load.traces import Shape, synthetic

WORKLOAD = synthetic(
    Shape(agents=4, rounds=2, contexts=(200, 260), longest_tokens=600, appended_tokens=70, generated_tokens=5)
)


def test_a_record_has_the_server_s_counts_and_times_in_order(server: Any) -> None:
    (record,) = play_offline(server.url, [[make_request(3, 1, [7] * 200, 4)]], in_flight=1)
    assert (record.agent, record.round, record.error) == (3, 1, None)
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (200, 4, 0)
    assert record.cached_storage_tokens == 0
    assert record.first_s is not None and record.second_s is not None and record.last_s is not None  # noqa: PT018
    assert 0 <= record.sent_s < record.first_s < record.second_s < record.last_s


def test_every_agent_plays_its_rounds_in_order_with_the_recorded_ids(server: Any) -> None:
    agents = requests_of(WORKLOAD, "0")
    records = play_offline(server.url, agents, in_flight=3)
    assert [record.error for record in records] == [None] * 8
    assert [record.round for record in records if record.agent == 2] == [0, 1]
    assert sorted(server.prompts) == sorted(WORKLOAD.prompt_ids(agent, index, "0")
                                            for agent in range(4) for index in range(2))  # fmt: skip
    second_rounds = [record for record in records if record.round == 1]
    assert all(record.cached_tokens == WORKLOAD.hit_tokens(record.agent, 1, 64) for record in second_rounds)


def test_no_more_requests_are_in_flight_than_asked_for(server: Any) -> None:
    server.token_s = 0.01
    play_offline(server.url, requests_of(WORKLOAD, "0"), in_flight=2)
    assert server.most_in_flight == 2


def test_agents_wait_their_turn_behind_the_others(server: Any) -> None:
    play_offline(server.url, requests_of(WORKLOAD, "0"), in_flight=1)
    assert server.prompts == [WORKLOAD.prompt_ids(agent, index, "0") for index in range(2) for agent in range(4)]


def test_poisson_agents_all_play(server: Any) -> None:
    records = play_poisson(server.url, requests_of(WORKLOAD, "0"), agents_per_s=200.0, seed=1)
    assert sorted((record.agent, record.round) for record in records) == [(a, r) for a in range(4) for r in range(2)]
    first_sent = [record.sent_s for record in sorted(records, key=lambda one: one.agent) if record.round == 0]
    assert first_sent == sorted(first_sent)


def test_arrivals_keep_their_pattern_at_another_rate() -> None:
    slow, fast = poisson_arrivals(50, 1.0, seed=3), poisson_arrivals(50, 2.0, seed=3)
    assert slow == pytest.approx([2 * time for time in fast])
    assert poisson_arrivals(50, 1.0, seed=4) != slow
    assert 30 < poisson_arrivals(2000, 40.0, seed=1)[-1] < 70


def test_arrivals_need_a_rate() -> None:
    with pytest.raises(ValueError, match="above 0"):
        poisson_arrivals(1, 0.0, seed=1)


def test_on_record_is_told_of_each_request(server: Any) -> None:
    seen: list[int] = []
    agents = requests_of(WORKLOAD, "0")
    play_offline(server.url, agents, in_flight=4, on_record=lambda record: seen.append(record.agent))
    assert sorted(seen) == [0, 0, 1, 1, 2, 2, 3, 3]


def changed(**meta: Any) -> Any:
    return lambda event: event | {"meta_info": event["meta_info"] | meta}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changed(prompt_tokens=9), "counted 9 prompt tokens, 10 were sent"),
        (changed(completion_tokens=3), "generated 3 tokens, 2 were asked for"),
        (changed(cached_tokens=11), "11 cached of 10"),
        (changed(finish_reason={"type": "abort", "message": "lost"}), "aborted: lost"),
        (lambda event: {"error": {"message": "gone"}}, "gone"),
        (lambda event: {"meta_info": 7}, "no usable answer"),
    ],
)
def test_a_wrong_answer_is_an_error_of_its_record(server: Any, change: Any, says: str) -> None:
    server.change = change
    (record,) = play_offline(server.url, [[make_request(0, 0, [1] * 10, 2)]], in_flight=1)
    assert says in (record.error or "")


def test_a_failed_agent_plays_no_further_round_and_the_others_go_on(server: Any) -> None:
    server.status = 503
    records = play_offline(server.url, requests_of(WORKLOAD, "0"), in_flight=2)
    assert len(records) == 4
    assert all("status 503: out of pages" in (record.error or "") for record in records)


def test_no_server_is_an_error_of_the_record() -> None:
    (record,) = play_offline("http://127.0.0.1:9", [[make_request(0, 0, [1], 1)]], in_flight=1)
    assert "no usable answer" in (record.error or "")


def test_nothing_to_play_ends_at_once(server: Any) -> None:
    assert play_offline(server.url, [[], []], in_flight=3) == []
