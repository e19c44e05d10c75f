"""What the demo promises, checked on made-up rounds."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from benchmarks import report
from benchmarks.rounds import Round, RoundKind, Traffic, Workload
from benchmarks.testbed import KV_BYTES_PER_TOKEN, PAGE_TOKENS, Generation

PAGES = 30
HIT_BYTES = PAGES * PAGE_TOKENS * KV_BYTES_PER_TOKEN
NOTHING = Traffic(0, 0, 0, 0, 0, 0)
HALVES = Traffic(HIT_BYTES // 2, HIT_BYTES // 2, HIT_BYTES // 2, HIT_BYTES // 2, HIT_BYTES // 2, HIT_BYTES // 2)
HOPPED = Traffic(0, 0, HIT_BYTES, 1000, 1000, HIT_BYTES)


def round_of(kind: RoundKind, traffic: Traffic, *, hit_tokens: int = PAGES * PAGE_TOKENS) -> Round:
    generation = Generation((1, 2, 3), PAGES * PAGE_TOKENS + 10, hit_tokens, "length", 1.5, 2.0)
    return Round(kind, ((7,) * (PAGES * PAGE_TOKENS + 10),), (generation,), traffic, 2.0, 0.5)


def good_rounds() -> list[Round]:
    return [
        round_of("fresh", NOTHING, hit_tokens=0),
        round_of("storage", HALVES),
        round_of("storage", HALVES),
        round_of("decode_memory", HOPPED),
    ]


def summary(ours: list[Round], stock: list[Round] | None = None, *, shaped: bool = True) -> dict[str, Any]:
    return report.summary(ours, stock or good_rounds(), shaped=shaped, settings={}, workload=Workload())


def broken(result: dict[str, Any]) -> list[str]:
    return [check["says"] for check in result["checks"] if not check["holds"]]


def test_good_rounds_keep_every_promise() -> None:
    result = summary(good_rounds())
    assert broken(result) == []
    assert result["outputs_identical"]
    assert result["bytes_hit"] == 2 * HIT_BYTES
    assert result["bytes_read_prefill"] == result["bytes_read_decode"] == HIT_BYTES
    assert result["last_round"]["bytes_hopped"] == HIT_BYTES
    assert json.loads(json.dumps(result)) == result


def test_one_different_token_is_told_with_its_round_and_agent() -> None:
    stock = good_rounds()
    generation = replace(stock[1].generations[0], output_ids=(1, 2, 4))
    stock[1] = replace(stock[1], generations=(generation,))
    result = summary(good_rounds(), stock)
    assert not result["outputs_identical"]
    assert broken(result) == ["every output token is the same as stock's: differs in round 2, agent 1"]


@pytest.mark.parametrize(
    ("traffic", "said"),
    [
        (replace(HALVES, read_prefill=HIT_BYTES), "read once"),
        (NOTHING, "read once"),
        (replace(HALVES, read_prefill=HIT_BYTES * 9 // 10, read_decode=HIT_BYTES // 10), "both sides read"),
        (replace(HALVES, link_decode=HIT_BYTES), "links confirm"),
    ],
)
def test_a_broken_promise_of_a_loaded_round_is_told(traffic: Traffic, said: str) -> None:
    rounds = [round_of(one.kind, traffic) if one.kind == "storage" else one for one in good_rounds()]
    assert any(said in line for line in broken(summary(rounds)))


@pytest.mark.parametrize(
    ("traffic", "said"),
    [
        (replace(HOPPED, hopped=HIT_BYTES // 2), "hopped"),
        (replace(HOPPED, read_decode=1), "read 0.0 MB from storage"),
        (replace(HOPPED, link_prefill=HIT_BYTES), "received from storage"),
    ],
)
def test_a_broken_promise_of_the_last_round_is_told(traffic: Traffic, said: str) -> None:
    rounds = [*good_rounds()[:-1], round_of("decode_memory", traffic)]
    assert any(said in line for line in broken(summary(rounds)))


def test_a_missing_hit_is_told() -> None:
    rounds = good_rounds()
    rounds[1] = round_of("storage", HALVES, hit_tokens=(PAGES - 1) * PAGE_TOKENS)
    assert "every page of the previous round's prompts was a hit" in broken(summary(rounds))


def test_on_loopback_nothing_is_said_about_links() -> None:
    def unlinked(traffic: Traffic) -> Traffic:
        return replace(traffic, link_prefill=None, link_decode=None, link_hopped=None)

    rounds = [replace(one, traffic=unlinked(one.traffic)) for one in good_rounds()]
    result = summary(rounds, shaped=False)
    assert result["link_bytes"] is None
    assert not any("link" in check["says"] or "both sides" in check["says"] for check in result["checks"])


def test_table_and_verdict_can_be_printed() -> None:
    console = Console(record=True, width=108)
    console.print(report.round_table("dualpath", good_rounds()))
    report.print_verdict(console, summary(good_rounds()))
    text = console.export_text()
    assert "memory of D" in text
    assert "NO" not in text


def test_prompts_are_the_same_each_time_and_differ_between_agents() -> None:
    workload = Workload()
    assert workload.appended(0, 1) == Workload().appended(0, 1)
    assert workload.appended(0, 1) != workload.appended(1, 1)
    assert len(workload.appended(0, 0)) == workload.first_tokens


def test_contexts_of_the_demo_are_as_long_as_it_says() -> None:
    workload = Workload()
    assert workload.first_tokens >= 2000
    assert workload.longest_tokens <= 8000
    assert [workload.kind(index) for index in range(5)] == ["fresh", *["storage"] * 3, "decode_memory"]


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="three rounds"):
        Workload(rounds=2)
