"""A prefill server of two data-parallel ranks: each request's HELLO goes to the rank that has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.testbed.cluster import Cluster, ClusterSpec
from benchmarks.testbed.servers import ServerSpec
from benchmarks.testbed.store import StoreSpec
from tests.e2e.conftest import REPOSITORY, SETTINGS, STORE_BYTES, References, log_dir
from tests.e2e.counters import count
from tests.e2e.cover import Model, Row
from tests.e2e.prompts import Prompts, ask_all, differences

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROW = Row("file", "gateway", "gqa", "mooncake", "tp1")


# By turns, and decode servers ask the bootstrap server who has a request. By the room's number, which is the default,
# stock SGLang 0.5.23 fails every room that is not rank 0's: it compares the number with the rank in attention data
# parallel, which without that is 0 on all of them.
METHOD = "round_robin"


@pytest.fixture(scope="module")
def cluster(model_path: Callable[[Model], Path], references: References) -> Iterator[Cluster]:
    references.of(ROW)  # before ours starts: both at once do not fit
    flags = ("--dualpath-policy", "tests.e2e.policies:Sharing", "--dualpath-chunk-bytes", "262144")
    settings = {**SETTINGS, "kv_connector": "dualpath", "extra_env": {"PYTHONPATH": str(REPOSITORY)}}
    spec = ClusterSpec(
        model=model_path(ROW.model),
        servers=(
            ServerSpec(
                role="prefill",
                dp_size=2,
                extra_flags=(*flags, "--load-balance-method", METHOD),
                **settings,  # type: ignore[arg-type]
            ),
            ServerSpec(role="decode", extra_flags=flags, **settings),  # type: ignore[arg-type]
        ),
        store=StoreSpec(kind=ROW.store, capacity_bytes=STORE_BYTES),
    )
    with Cluster(spec, log_dir=log_dir("dp")) as cluster:
        yield cluster


def test_both_ranks_share_their_reads_and_outputs_are_those_of_stock(
    cluster: Cluster, prompts: Prompts, references: References
) -> None:
    expected = references.of(ROW)
    some = {name: tokens for name, tokens in prompts.items() if 600 < len(tokens) < 4000}
    wanted = {name: expected[name] for name in some}
    assert differences(ask_all(cluster, some), wanted) == {}
    cluster.flush()
    before = count(cluster)
    log = len(cluster.server_log("prefill"))
    for _ in range(2):
        assert differences(ask_all(cluster, some, at_once=4), wanted) == {}
        cluster.flush()
    seen = count(cluster).since(before)
    reads = [line for line in cluster.server_log("prefill")[log:].splitlines() if "DualPath read of room" in line]
    for rank in ("DP0", "DP1"):
        assert any(rank in line and "split" in line for line in reads), f"no shared read on {rank}"
    assert seen.total("read_bytes_total", "decode") > 0
    assert seen.total("fallbacks_total", "prefill_without_dualpath") == 0
    assert seen.total("fallbacks_total", "prefill_silent") == 0
