"""Collectives of a real gloo group, and of a rank that is alone."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from sglang_dualpath.hicache.ranks import GroupRanks, SoleRank, agreed, make_ranks


def _talk(rank: int, store: str, answers: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    ranks = make_ranks(dist.group.WORLD, rank=rank, size=2)
    said = [
        ranks.least([rank, 5, -(2**40) * rank]),
        ranks.of_first([rank + 7, -1]),
        agreed(ranks, rank == 0),
        agreed(ranks, True),
        ranks.least([]),
        ranks.of_first([]),
    ]
    answers.put((rank, type(ranks) is GroupRanks, said))
    dist.destroy_process_group()


def test_both_ranks_get_the_same_from_a_gloo_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    processes = [spawn.Process(target=_talk, args=(rank, str(tmp_path / "store"), answers)) for rank in range(2)]
    for process in processes:
        process.start()
    heard = sorted(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(30)
    answers.close()
    said = [[0, 5, -(2**40)], [7, -1], False, True, [], []]
    assert heard == [(0, True, said), (1, True, said)]


def test_a_rank_that_is_alone_needs_no_group() -> None:
    ranks = make_ranks(None, rank=0, size=1)
    assert isinstance(ranks, SoleRank)
    assert ranks.least([3, True, -4]) == [3, True, -4]
    assert ranks.of_first([3]) == [3]
    assert agreed(ranks, True)
    assert not agreed(ranks, False)
