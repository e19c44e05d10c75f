"""Servers of two data-parallel ranks each: an engine per rank, and each request's HELLO goes to the one that has it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.testbed.cluster import Cluster, ClusterSpec
from benchmarks.testbed.metrics import metric_sum
from benchmarks.testbed.servers import Role, ServerSpec
from benchmarks.testbed.store import StoreSpec
from tests.e2e.conftest import (
    PATCHED,
    REPOSITORY,
    SETTINGS,
    STORE_BYTES,
    UNHOOKED,
    References,
    log_dir,
)
from tests.e2e.counters import count
from tests.e2e.cover import TRANSFERS, Model, Row
from tests.e2e.prompts import Prompts, ask_all, differences

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

ROWS = tuple(Row("file", "gateway", "gqa", transfer, "tp1") for transfer in TRANSFERS)
RANKS = (0, 1)
# By turns, decode servers ask the bootstrap server who has a request; by the room's number, the default, they reckon.
METHODS = ("round_robin", "follow_bootstrap_room")
KINDS = tuple(itertools.product(METHODS, ROWS)) if os.environ.get("DUALPATH_TEST_ALL") else ((METHODS[0], ROWS[0]),)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1].transfer}")
def cluster(
    request: pytest.FixtureRequest, model_path: Callable[[Model], Path], references: References
) -> Iterator[Cluster]:
    method, row = request.param
    references.of(row)  # before ours starts: both at once do not fit
    flags = (
        "--dualpath-policy", "tests.e2e.policies:Patient", "--dualpath-chunk-bytes", "262144",
        "--dualpath-lease", "3", "--dualpath-hello-silence", "15",
    )  # fmt: skip

    def server(role: Role, *more: str) -> ServerSpec:
        return ServerSpec(
            role=role,
            kv_connector="dualpath",
            dp_size=len(RANKS),
            extra_flags=(*flags, *more),
            extra_env={"PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), PATCHED]))},
            transfer_backend=row.transfer,
            **SETTINGS,  # type: ignore[arg-type]
        )

    spec = ClusterSpec(
        model=model_path(row.model),
        servers=(server("prefill", "--load-balance-method", method), server("decode")),
        store=StoreSpec(kind=row.store, capacity_bytes=STORE_BYTES),
        router=row.router,
    )
    with Cluster(spec, log_dir=log_dir(f"dp-{method}-{row.transfer}")) as cluster:
        for role in ("prefill", "decode"):
            assert (UNHOOKED in cluster.server_log(role)) == bool(PATCHED)
        yield cluster


def stages(cluster: Cluster) -> dict[tuple[str, int], float]:
    """Stages that requests have passed through so far, by role and data-parallel rank."""
    name = "sglang:per_stage_req_latency_seconds_count"
    return {
        (role, rank): metric_sum(cluster.metrics(role), name, dp_rank=str(rank))
        for role in ("prefill", "decode")
        for rank in RANKS
    }


def test_all_ranks_share_reads_and_outputs_are_those_of_stock(
    cluster: Cluster, prompts: Prompts, references: References
) -> None:
    expected = references.of(ROWS[0])  # of its model and ranks, whatever the transfer
    some = {name: tokens for name, tokens in prompts.items() if 600 < len(tokens) < 4000}
    wanted = {name: expected[name] for name in some}
    assert differences(ask_all(cluster, some), wanted) == {}
    cluster.flush()
    before = count(cluster)
    served, log = stages(cluster), len(cluster.server_log("prefill"))
    for _ in range(2):
        assert differences(ask_all(cluster, some, at_once=4), wanted) == {}
        cluster.flush()
    seen = count(cluster).since(before)
    idle = [engine for engine, passed in stages(cluster).items() if passed <= served[engine]]
    assert idle == [], "engines without a request"
    reads = [line for line in cluster.server_log("prefill")[log:].splitlines() if "DualPath read of room" in line]
    for rank in RANKS:
        assert any(f"DP{rank}" in line and ", split," in line for line in reads), f"no shared read on rank {rank}"
    assert seen.total("read_bytes_total", "decode") > 0
    # A HELLO at the wrong rank is no offer, and every other one would be.
    assert seen.total("offers_total", "made") >= 1.5 * len(some)
    for reason in ("prefill_without_dualpath", "prefill_silent"):
        assert seen.total("fallbacks_total", reason) == 0
