"""Clusters of real servers, one at a time: a pair takes some 8 GB and a minute to start."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.policies import PolicySwitch
from benchmarks.testbed.client import Client
from benchmarks.testbed.cluster import Cluster, ClusterSpec
from benchmarks.testbed.errors import RequestError
from benchmarks.testbed.model import identity_mla_model, small_identity_model
from benchmarks.testbed.servers import Role, ServerSpec, stock_pair
from benchmarks.testbed.store import StoreSpec
from tests.e2e.cover import Model, Ranks, Row
from tests.e2e.faulty_store import BACKEND, ROLE_ENV
from tests.e2e.prompts import NEW_TOKENS, Outputs, Prompts, ask_all, differences, make_prompts

PATCHED = os.environ.get("DUALPATH_PATCHED_SGLANG", "")
"""Where the copy of SGLang is that `make check-patches` tests against; empty for the installed one."""
UNHOOKED = (
    "so DualPath does not hook: hicache-storage-request-handle, register-kv-classes, status-of-a-cleared-room, "
    "data-parallel-rank-of-a-room."
)
REPOSITORY = Path(__file__).resolve().parents[2]
MODELS: Mapping[Model, Callable[[Path], Path]] = {"gqa": small_identity_model, "mla": identity_mla_model}
STORE_BYTES = 1 << 30
CALM_LEASE_S = 2.5
STOCK_TIMEOUT_S = 100.0  # the longest prompt takes some 10 s of a core
SETTINGS = {"max_total_tokens": 16_000, "hicache_ratio": 2.0, "chunked_prefill_tokens": 4096}


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    return make_prompts()


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of this run; logs of servers stay in out/e2e of the checkout."""
    return tmp_path_factory.mktemp("e2e")


@pytest.fixture(scope="session")
def model_path() -> Callable[[Model], Path]:
    return lambda model: MODELS[model](REPOSITORY / "out" / "models")


Kind = tuple[Model, Ranks]
"""What may change outputs of stock SGLang: the order in which numbers are added up."""


def kind_of(row: Row) -> Kind:
    return row.model, row.ranks


class References:
    """Stock SGLang's outputs by model and ranks, made once by a stock pair that is ended before ours starts."""

    def __init__(self, prompts: Prompts, model_path: Callable[[Model], Path]) -> None:
        self._prompts = prompts
        self._model_path = model_path
        self._made: dict[Kind, Outputs] = {}
        self.samples: dict[Kind, list[tuple[int, ...]] | None] = {}
        """What two samples of one prompt gave, None if there was no answer."""
        self.self_differences: dict[Kind, int] = {}

    def of(self, row: Row) -> Outputs:
        kind = kind_of(row)
        if kind not in self._made:
            logs = f"stock-{row.model}-{row.ranks}"
            try:
                self._made[kind] = self._make(row, log_dir(logs))
            except RequestError as error:
                # A stock pair was seen to leave a request unanswered. Nothing of ours runs in it: ask another one.
                print(f"Stock SGLang failed: {error} Once more; logs of the first try are in out/e2e/{logs}.")
                self._made[kind] = self._make(row, log_dir(f"{logs}-again"))
        return self._made[kind]

    def _make(self, row: Row, logs: Path) -> Outputs:
        spec = ClusterSpec(
            model=self._model_path(row.model),
            servers=stock_pair(decode_hicache=True, tp_size=row.tp_size, **SETTINGS),
            store=StoreSpec(capacity_bytes=STORE_BYTES),
            request_timeout_s=STOCK_TIMEOUT_S,
        )
        with Cluster(spec, log_dir=logs) as cluster:
            first = ask_all(cluster, self._prompts)
            cluster.flush()
            # Some of them are enough to show whether stock agrees with itself.
            again = ask_all(cluster, dict(islice(self._prompts.items(), 0, None, 3)))
            self.self_differences[kind_of(row)] = len(differences(again, first))
            self.samples[kind_of(row)] = two_samples(cluster, self._prompts["length-700"])
        return first


def two_samples(cluster: Cluster, tokens: Sequence[int], wait_s: float = 6.0) -> list[tuple[int, ...]] | None:
    """Greedy outputs of one request with ``n=2``, or None if none came in time; nothing of it is left then."""
    sampling = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True, "n": 2}
    impatient = Client(cluster.clients["router"].base_url, timeout_s=wait_s)
    try:
        answer = impatient.post("/generate", {"input_ids": list(tokens), "sampling_params": sampling})
        return [tuple(sample["output_ids"]) for sample in answer.json()]
    except RequestError:
        for name in cluster.names:
            cluster.clients[name].post("/abort_request", {"abort_all": True})
        return None
    finally:
        impatient.close()


def calm_flags(tp_size: int) -> tuple[str, ...]:
    """What makes servers of several ranks do on two cores what they would do on more.

    Four schedulers and their threads wait for each other's turns here: leases that last, and reads so slow that the
    other side's ranks have had theirs before one engine is through.
    """
    return ("--dualpath-lease", str(CALM_LEASE_S), "--dualpath-read-rate-limit", "32MiB") if tp_size > 1 else ()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every policy over one of the stores with one rank, and the default one everywhere."""
    needless = [item for item in items if isinstance(item, pytest.Function) and _is_needless(item)]
    if needless and not os.environ.get("DUALPATH_TEST_ALL"):
        config.hook.pytest_deselected(items=needless)
        items[:] = [item for item in items if item not in needless]


BY_TRANSFER = {
    "test_several_samples_of_one_prompt_end_as_with_stock",  # waits 6 s for an answer that does not come
    "test_a_decode_server_of_another_version",  # starts a server
}
"""Tests of what does not depend on the store, nor the second of them on the transfer backend."""


def _is_needless(item: pytest.Function) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    row = params.get("pair")
    if item.originalname in BY_TRANSFER:
        return row.store != "mooncake" if isinstance(row, Row) else params.get("faults") == "nixl"
    policy = params.get("policy", "split")
    return isinstance(row, Row) and policy != "split" and (row.store != "mooncake" or row.tp_size > 1)


def log_dir(name: str) -> Path:
    path = REPOSITORY / "out" / ("e2e-patched" if PATCHED else "e2e") / name
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="session")
def references(prompts: Prompts, model_path: Callable[[Model], Path]) -> References:
    return References(prompts, model_path)


class Pair:
    """A DualPath pair whose policy can be switched."""

    def __init__(self, cluster: Cluster, switch: PolicySwitch, row: Row) -> None:
        self.cluster = cluster
        self.row = row
        self.use_policy = switch.use


@pytest.fixture(scope="module")
def pair(
    request: pytest.FixtureRequest, work: Path, model_path: Callable[[Model], Path], references: References
) -> Iterator[Pair]:
    row: Row = request.param
    references.of(row)  # before ours starts: both at once do not fit
    switch = PolicySwitch(work / f"policy-{row}")
    # SGLang's own check that its ranks do the same in the same order; it ends a server otherwise.
    checker = {"SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1" if row.tp_size > 1 else "0"}
    settings = {
        **SETTINGS,
        "tp_size": row.tp_size,
        "transfer_backend": row.transfer,
        # Small chunks: `split` shares what takes longer than one of them, by the rates that it has seen.
        "extra_flags": (*switch.flags, "--dualpath-chunk-bytes", "262144", *calm_flags(row.tp_size)),
    }

    def server(role: Role, *, hicache: bool) -> ServerSpec:
        return ServerSpec(
            role=role,
            kv_connector="dualpath",
            hicache=hicache,
            extra_env={**switch.environment, **checker, ROLE_ENV: role},
            **settings,  # type: ignore[arg-type]
        )

    spec = ClusterSpec(
        model=model_path(row.model),
        # Stock's command lines with HiCache on the prefill server, to which the flag was added and, on the decode
        # server, the storage flags that it asks for.
        servers=(server("prefill", hicache=True), server("decode", hicache=False)),
        store=StoreSpec(
            kind=row.store, capacity_bytes=STORE_BYTES, extra_config=BACKEND if row.store == "dynamic" else None
        ),
        router=row.router,
    )
    with Cluster(spec, log_dir=log_dir(str(row))) as cluster:
        for role in ("prefill", "decode"):
            log = cluster.server_log(role)
            assert (UNHOOKED in log) == bool(PATCHED), f"{role} does not run the SGLang that is to be tested"
        yield Pair(cluster, switch, row)
