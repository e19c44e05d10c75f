"""Collectives of a real gloo group, and of a rank that is alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from sglang_dualpath.hicache.ranks import SoleRank, agreed, make_ranks

REPOSITORY = Path(__file__).resolve().parents[2]
TALK = """
import json, sys
import torch.distributed as dist
from sglang_dualpath.hicache.ranks import agreed, make_ranks

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
ranks = make_ranks(dist.group.WORLD, rank=rank, size=2)
print(json.dumps([
    [ranks.rank, ranks.size],
    ranks.least([rank, 5, -(2**40) * rank]),
    ranks.of_first([rank + 7, -1]),
    agreed(ranks, rank == 0),
    agreed(ranks, True),
    ranks.least([]),
    ranks.of_first([]),
]))
dist.destroy_process_group()
"""


def test_both_ranks_get_the_same_from_a_gloo_group(tmp_path: Path) -> None:
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", TALK]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=env, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [json.loads(process.communicate(timeout=90)[0]) for process in processes]
    assert said == [[[rank, 2], [0, 5, -(2**40)], [7, -1], False, True, [], []] for rank in range(2)]


def test_a_rank_that_is_alone_needs_no_group() -> None:
    ranks = make_ranks(None, rank=0, size=1)
    assert isinstance(ranks, SoleRank)
    assert ranks.least([3, True, -4]) == [3, True, -4]
    assert ranks.of_first([3]) == [3]
    assert agreed(ranks, True)
    assert not agreed(ranks, False)
