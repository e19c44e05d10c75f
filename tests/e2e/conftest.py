"""Clusters of real servers, one at a time: a pair takes some 8 GB and a minute to start."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks.policies import PolicySwitch
from benchmarks.testbed.client import Client
from benchmarks.testbed.cluster import Cluster, ClusterSpec
from benchmarks.testbed.errors import RequestError
from benchmarks.testbed.model import identity_mla_model, small_identity_model
from benchmarks.testbed.servers import Role, ServerSpec, stock_pair
from benchmarks.testbed.store import StoreSpec
from tests.e2e.cover import Model, Row
from tests.e2e.faulty_store import BACKEND, ROLE_ENV
from tests.e2e.prompts import NEW_TOKENS, Outputs, Prompts, ask_all, differences, make_prompts

PATCHED = os.environ.get("DUALPATH_PATCHED_SGLANG", "")
"""Where the copy of SGLang is that `make check-patches` tests against; empty for the installed one."""
UNHOOKED = (
    "so DualPath does not hook: hicache-storage-request-handle, register-kv-classes, status-of-a-cleared-room."
)
REPOSITORY = Path(__file__).resolve().parents[2]
MODELS: Mapping[Model, Callable[[Path], Path]] = {"gqa": small_identity_model, "mla": identity_mla_model}
STORE_BYTES = 1 << 30
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


class References:
    """Stock SGLang's outputs by model, made once by a stock pair that is ended before ours starts."""

    def __init__(self, prompts: Prompts, model_path: Callable[[Model], Path]) -> None:
        self._prompts = prompts
        self._model_path = model_path
        self._made: dict[Model, Outputs] = {}
        self.samples: dict[Model, list[tuple[int, ...]] | None] = {}
        """What two samples of one prompt gave, None if there was no answer."""
        self.self_differences: dict[Model, int] = {}

    def of(self, model: Model) -> Outputs:
        if model not in self._made:
            try:
                self._made[model] = self._make(model, log_dir(f"stock-{model}"))
            except RequestError as error:
                # A stock pair was seen to leave a request unanswered. Nothing of ours runs in it: ask another one.
                print(f"Stock SGLang failed: {error} Once more; logs of the first try are in out/e2e/stock-{model}.")
                self._made[model] = self._make(model, log_dir(f"stock-{model}-again"))
        return self._made[model]

    def _make(self, model: Model, logs: Path) -> Outputs:
        spec = ClusterSpec(
            model=self._model_path(model),
            servers=stock_pair(decode_hicache=True, **SETTINGS),
            store=StoreSpec(capacity_bytes=STORE_BYTES),
            request_timeout_s=STOCK_TIMEOUT_S,
        )
        with Cluster(spec, log_dir=logs) as cluster:
            first = ask_all(cluster, self._prompts)
            cluster.flush()
            again = ask_all(cluster, self._prompts)
            self.self_differences[model] = len(differences(again, first))
            self.samples[model] = two_samples(cluster, self._prompts["length-700"])
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
    references.of(row.model)  # before ours starts: both at once do not fit
    switch = PolicySwitch(work / f"policy-{row}")
    settings = {
        **SETTINGS,
        "transfer_backend": row.transfer,
        # Small chunks: `split` shares what takes longer than one of them, by the rates that it has seen.
        "extra_flags": (*switch.flags, "--dualpath-chunk-bytes", "262144"),
    }

    def server(role: Role, *, hicache: bool) -> ServerSpec:
        return ServerSpec(
            role=role,
            kv_connector="dualpath",
            hicache=hicache,
            extra_env={**switch.environment, ROLE_ENV: role},
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
