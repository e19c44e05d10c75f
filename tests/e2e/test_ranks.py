"""Tensor parallel 2, one rank held up: no request waits longer than it may, or differs, and no rank loses a page."""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.testbed.cluster import Cluster, ClusterSpec
from benchmarks.testbed.errors import RequestError
from benchmarks.testbed.servers import ServerSpec
from benchmarks.testbed.store import StoreSpec
from tests.e2e.accounts import unaccounted
from tests.e2e.conftest import CALM_LEASE_S, REPOSITORY, calm_flags, log_dir
from tests.e2e.counters import Counters, count
from tests.e2e.cover import MODELS, TRANSFERS, Model, Transfer
from tests.e2e.faulty_store import BACKEND, ROLE_ENV
from tests.e2e.prompts import Outputs, Prompts, ask, ask_all

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

REQUESTS = 200
AT_ONCE = 8
DEADLINE_S = 20.0
SLOW_PAGE_S = 0.05  # some 16 pages a prompt
# Device and host memory hold some of the prompts, so that most requests read from storage.
SETTINGS = {"max_total_tokens": 8192, "hicache_ratio": 1.3, "chunked_prefill_tokens": 4096, "tp_size": 2}
RANKS = ("prefill.0", "prefill.1", "decode.0", "decode.1")


class Pair:
    """A pair of servers of two ranks each, what it answers undisturbed, and what tests do to it."""

    def __init__(self, cluster: Cluster, prompts: Prompts) -> None:
        self.cluster = cluster
        self.prompts = prompts
        assert cluster.store is not None
        assert cluster.store.directory is not None
        self._directory = cluster.store.directory.parent
        self.expected: Outputs = ask_all(cluster, prompts)

    def hold_up(self, kind: str, delay_s: float, *ranks: str, every: int = 1) -> None:
        """Delay the first of `every` store reads, pushes or messages (`kind`) of these ranks from now on, and no other.

        See `faulty_store` for the kinds.
        """
        faults: dict[str, dict[str, float]] = {rank: {kind: delay_s, "every": every} for rank in ranks}
        if kind == "control_s" and ranks:
            # Reads that take so long that a word which comes late is still of use.
            for rank in ("prefill.0", "prefill.1"):
                faults.setdefault(rank, {})["page_s"] = SLOW_PAGE_S
        (self._directory / "faults.json").write_text(json.dumps(faults))

    def delays(self, kind: str, rank: str) -> int:
        """How often that was delayed on a rank, ever."""
        return int(json.loads((self._directory / f"delays-{rank}").read_text()).get(kind, 0))

    def leaks(self) -> list[str]:
        """What is missing on any rank although nothing is in flight. Empties the caches, but does not flush."""
        problems = unaccounted(self._directory, RANKS)
        deadline = time.monotonic() + 20
        # Servers bring their gauges up to date once a second: one may still be of before the last read's end.
        while (slots := self._slots_in_use()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return [*problems, f"{slots:g} reserve slots in use"] if slots else problems

    def _slots_in_use(self) -> float:
        """Reserve slots that back a claim or are in quarantine, of all ranks."""
        now = count(self.cluster)
        return now.total("reserve_slots", "backing") + now.total("reserve_slots", "quarantined")

    def explain(self) -> None:
        """Let the decode ranks say, until the requests in flight have ended, what those wait for."""
        (self._directory / "explain").touch()

    def explained(self) -> str:
        """What they said last. They say no more."""
        (self._directory / "explain").unlink(missing_ok=True)
        return "\n".join(f"{file.name}: {file.read_text()}" for file in self._directory.glob("waiting-decode.*"))

    def free(self) -> dict[str, int]:
        """Tokens that are free in the host pool of each rank, as each says from now on."""
        start, deadline = time.time(), time.monotonic() + 20
        files = {rank: self._directory / f"free-{rank}" for rank in RANKS}
        while min(file.stat().st_mtime for file in files.values()) <= start:
            assert time.monotonic() < deadline, "a rank says no longer how many are free"
            time.sleep(0.05)
        return {rank: int(file.read_text()) for rank, file in files.items()}

    def ask(self, names: Sequence[str], at_once: int) -> Counters:
        """Ask these prompts. Asserts that no answer differs or is late; returns what was counted meanwhile."""
        before = count(self.cluster)
        with ThreadPoolExecutor(at_once) as pool:
            ends = list(pool.map(self._ask_one, names))
        assert sum(not right for right, _ in ends) == 0
        assert max(seconds for _, seconds in ends) < DEADLINE_S + 5, self.explained()
        return count(self.cluster).since(before)

    def _ask_one(self, name: str) -> tuple[bool, float]:
        """Whether the answer was right, and the seconds that it took."""
        start = time.monotonic()
        late = threading.Timer(DEADLINE_S + 5, self.explain)
        late.start()
        try:
            right = ask(self.cluster, self.prompts[name]) == self.expected[name]
        except RequestError as error:
            raise AssertionError(f"{error}\n{self.explained()}") from error
        finally:
            late.cancel()
        return right, time.monotonic() - start


# With MLA each rank reads whole pages, with GQA its own heads of them; the ranks agree in the same way.
KINDS: tuple[tuple[Model, Transfer], ...] = tuple(itertools.product(MODELS, TRANSFERS))
if not os.environ.get("DUALPATH_TEST_ALL"):
    KINDS = (("gqa", "mooncake"),)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def pair(request: pytest.FixtureRequest, model_path: Callable[[Model], Path]) -> Iterator[Pair]:
    model, transfer = request.param
    source = random.Random("ranks")
    prompts = {f"prompt-{n}": source.choices(range(256), k=source.randrange(700, 1500)) for n in range(16)}
    flags = (
        "--dualpath-policy", "tests.e2e.policies:Sharing", "--dualpath-chunk-bytes", "262144",
        "--dualpath-read-deadline", str(DEADLINE_S), *calm_flags(2),
    )  # fmt: skip

    def server(role: str) -> ServerSpec:
        return ServerSpec(
            role=role,  # type: ignore[arg-type]
            kv_connector="dualpath",
            transfer_backend=transfer,
            extra_flags=flags,
            extra_env={
                ROLE_ENV: role,
                "PYTHONPATH": str(REPOSITORY),
                "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1",  # ends a server whose ranks do not do the same
            },
            **SETTINGS,  # type: ignore[arg-type]
        )

    spec = ClusterSpec(
        model=model_path(model),
        servers=(server("prefill"), server("decode")),
        store=StoreSpec(kind="dynamic", extra_config=BACKEND),
    )
    with Cluster(spec, log_dir=log_dir(f"ranks-{model}-{transfer}")) as cluster:
        yield Pair(cluster, prompts)


# One rank of each server at a time, so that either side's ranks end in either order. Undisturbed, a page takes 1 ms to
# read and a chunk 2 ms to push.
@pytest.mark.parametrize(
    ("kind", "delay_s", "ranks"),
    [
        ("page_s", 0.01, ("prefill.0", "decode.1")),
        ("hop_s", 0.1, ("decode.1",)),
        ("control_s", 0.02, ("prefill.1", "decode.1")),
        ("control_s", 0.02, ("prefill.0", "decode.0")),
    ],
    ids=["store read", "hop", "control", "control of rank 0"],
)
def test_one_rank_held_up(pair: Pair, kind: str, delay_s: float, ranks: tuple[str, ...]) -> None:
    cluster = pair.cluster
    cluster.flush()
    delayed = {rank: pair.delays(kind, rank) for rank in ranks}
    log = len(cluster.server_log("prefill"))
    pair.hold_up(kind, delay_s, *ranks)
    seen = pair.ask(random.Random(kind).choices(list(pair.prompts), k=REQUESTS), AT_ONCE)
    pair.hold_up(kind, 0.0)  # on no rank
    assert seen.total("pushed_bytes_total", "decode") > 0, "the decode engines were meant to take part"
    shared = [line for line in cluster.server_log("prefill")[log:].splitlines() if ", split," in line]
    for number in ("TP0", "TP1"):
        assert any(number in line for line in shared), f"{number} shared no read"
    assert pair.leaks() == []
    assert [rank for rank in ranks if pair.delays(kind, rank) <= delayed[rank]] == [], "nothing was held up there"


@pytest.mark.parametrize(
    ("kind", "delay_s", "every", "rank", "requests", "reason"),
    [
        # Pages land late, after others have taken their place.
        ("late_push_s", 1.3 * CALM_LEASE_S, 3, "decode.1", 12, "lease_expired"),
        # The first read alone, so that what waits behind it is not late because of further ones.
        ("read_s", DEADLINE_S + 1, 1000, "prefill.0", 4, "read_deadline"),
    ],
    ids=["pushes longer than their lease", "store read longer than its deadline"],
)
def test_one_rank_held_up_for_longer_than_it_may(
    pair: Pair, kind: str, delay_s: float, every: int, rank: str, requests: int, reason: str
) -> None:
    pair.cluster.flush()
    pair.hold_up(kind, delay_s, rank, every=every)
    seen = pair.ask(list(pair.prompts)[:requests], at_once=4)
    pair.hold_up(kind, 0.0)  # on no rank
    assert seen.total("fallbacks_total", reason) > 0
    assert pair.leaks() == []


def test_ranks_have_equally_many_host_pages(pair: Pair) -> None:
    free = pair.free()
    assert free["prefill.0"] == free["prefill.1"]
    assert free["decode.0"] == free["decode.1"]
