"""Workloads from recorded traces: content kept, lengths scaled, broken files refused in a sentence."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load import traces
from benchmarks.load.traces import Shape, TraceError

SHAPE = Shape(agents=2, rounds=2, longest_tokens=1000, generated_tokens=8)


def session(number: int, *, grows_by: int = 10, rounds: int = 5) -> dict[str, Any]:
    requests: list[dict[str, Any]] = []
    for index in range(rounds):
        blocks = 100 + grows_by * index
        requests.append({"type": "n", "in": blocks * 64 + 7, "out": 200, "hash_ids": list(range(1, blocks + 1))})
        requests.append({"type": "subagent", "requests": []})
    return {"id": f"s{number}", "block_size": 64, "requests": requests}


def archive(path: Path, sessions: list[dict[str, Any]]) -> Path:
    with tarfile.open(path, "w:xz" if path.suffix == ".xz" else "w") as tar:
        for number, content in enumerate(sessions):
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"trace_{number}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def conversation(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_bytes(lzma.compress("\n".join(json.dumps(line) for line in lines).encode()))
    return path


def requests(count: int) -> list[dict[str, Any]]:
    """Each shares block 0 and, from the second on, block 1; the rest is its own."""
    return [{"timestamp": n, "input_length": 4 * 512 - 100, "output_length": 50,
             "hash_ids": [0, 1, 1000 + 2 * n, 1001 + 2 * n]} for n in range(count)]  # fmt: skip


@pytest.mark.parametrize("name", ["all.tar", "all.tar.xz"])
def test_sessions_are_scaled_to_the_largest_context(tmp_path: Path, name: str) -> None:
    workload = traces.load(str(archive(tmp_path / name, [session(1), session(2)])), SHAPE)
    assert 900 <= workload.longest_tokens <= SHAPE.longest_tokens
    assert [len(trajectory.rounds) for trajectory in workload.trajectories] == [2, 2]


def test_equal_blocks_of_a_session_are_equal_tokens_and_other_sessions_share_none(tmp_path: Path) -> None:
    workload = traces.load(str(archive(tmp_path / "a.tar", [session(1), session(2)])), SHAPE)
    stored = workload.fill_ids(0)
    shared = workload.hit_tokens(0, 0, 1)
    assert workload.prompt_ids(0, 0, "0")[:shared] == stored[:shared]
    assert shared >= 0.95 * len(stored)
    assert workload.fill_ids(1)[:32] != stored[:32]


def test_a_session_s_hit_share_survives_the_scaling(tmp_path: Path) -> None:
    workload = traces.load(str(archive(tmp_path / "a.tar", [session(1)])), Shape(agents=1, rounds=1))
    share = workload.hit_tokens(0, 0, 1) / workload.trajectories[0].rounds[0].prompt_tokens
    recorded = 110 / 120  # blocks of the second and the third request, around the middle of five
    assert share == pytest.approx(recorded, abs=0.01)


def test_one_session_may_be_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps(session(1)))
    assert len(traces.load(str(path), Shape(agents=1)).trajectories) == 1


def test_too_few_sessions_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", [session(1), session(2, rounds=2)])
    with pytest.raises(TraceError, match="has 1 usable sessions"):
        traces.load(str(path), SHAPE)


def test_a_session_that_was_compacted_in_the_middle_is_left_out(tmp_path: Path) -> None:
    compacted = session(1)
    compacted["requests"][4]["hash_ids"] = list(range(5000, 5120))
    with pytest.raises(TraceError, match="has 0 usable sessions"):
        traces.load(str(archive(tmp_path / "a.tar", [compacted])), Shape(agents=1, rounds=2))


def test_conversations_hit_what_earlier_requests_had(tmp_path: Path) -> None:
    workload = traces.load(str(conversation(tmp_path / "m.jsonl.xz", requests(40))), SHAPE)
    first = workload.trajectories[0]
    assert first.fill_tokens == pytest.approx(first.rounds[0].prompt_tokens * 1024 / (4 * 512 - 100), rel=0.02)
    assert workload.prompt_ids(0, 0, "0")[: first.fill_tokens] == workload.fill_ids(0)
    assert workload.prompt_ids(0, 0, "0")[first.fill_tokens :] != workload.prompt_ids(0, 0, "1")[first.fill_tokens :]
    assert workload.longest_tokens <= SHAPE.longest_tokens


def test_rows_of_the_paper_keep_their_proportions() -> None:
    workload = traces.load("paper:64K", Shape(agents=8))
    trajectory = workload.trajectories[0]
    appended, generated = trajectory.rounds[0].pieces[-1].tokens, trajectory.rounds[0].generated_tokens
    assert appended / generated == pytest.approx(429 / 176, rel=0.05)
    assert workload.longest_tokens <= 8000


def test_low_reuse_hits_about_as_much_as_the_trace() -> None:
    workload = traces.synthetic_low_reuse(Shape(agents=200))
    prompts = sum(round_.prompt_tokens for trajectory in workload.trajectories for round_ in trajectory.rounds)
    assert workload.total_hit_tokens(64) / prompts == pytest.approx(traces.LOW_REUSE_HIT_SHARE, abs=0.03)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_synthetic_prompts_stay_within_the_largest_context(rounds: int) -> None:
    workload = traces.synthetic(Shape(agents=5, rounds=rounds))
    assert max(round_.prompt_tokens for one in workload.trajectories for round_ in one.rounds) <= 8000


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b"{", "no coding-agent session"),
        ("a.json", b'{"id": "x", "requests": []}', "no coding-agent session"),
        ("a.json", b'{"id": "x", "block_size": 64, "requests": []}', "0 usable sessions"),
        ("a.json", b'{"id": "x", "block_size": 0, "requests": [{"type": "n", "in": 5, "out": 1}]}', "block size"),
        ("a.json", b'{"id": "x", "block_size": 64, "requests": [{"type": "n", "in": 5, "hash_ids": [1,2,3]}]}',
         "more blocks than"),
        ("a.tar", b"not an archive", "cannot be read"),
        ("a.tar.xz", b"not an archive", "cannot be read"),
        ("a.jsonl", b"[]\n", "line 1 is no request"),
        ("a.jsonl", b'{"input_length": 0, "output_length": 1, "hash_ids": [1]}\n', "without tokens"),
        ("a.jsonl", b'{"input_length": 600, "output_length": 1, "hash_ids": [1]}\n', "1 blocks for 600 tokens"),
        ("a.jsonl", b"", "too few requests"),
        ("a.jsonl.xz", b"no xz", "cannot be read"),
        ("a.csv", b"1,2", "no trace that is known"),
    ],
)  # fmt: skip
def test_a_broken_trace_is_refused_in_one_sentence(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TraceError, match=says) as caught:
        traces.load(str(path), SHAPE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["paper:1K", "missing.json"])
def test_an_unknown_source_is_refused(source: str) -> None:
    with pytest.raises(TraceError):
        traces.load(source, SHAPE)
