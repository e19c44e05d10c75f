"""Faults from outside: whatever breaks, the tokens are right, nothing is later than it may be, and nothing leaks."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from benchmarks.testbed.cluster import Cluster, ClusterSpec
from benchmarks.testbed.errors import RequestError
from benchmarks.testbed.network import NetworkSpec
from benchmarks.testbed.servers import ServerSpec
from benchmarks.testbed.store import StoreSpec
from tests.e2e.accounts import unaccounted
from tests.e2e.conftest import REPOSITORY, SETTINGS, log_dir
from tests.e2e.counters import Counters, count
from tests.e2e.cover import TRANSFERS, Model
from tests.e2e.direct import ask_pair
from tests.e2e.faulty_store import BACKEND, ROLE_ENV

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

LEASE_S = 1.0
SILENCE_S = 2.0
DEADLINE_S = 20.0
CHUNK_PAGES = 4  # of 128 KB
PROMPTS = [list(range(seed, 250)) * 9 for seed in (0, 3, 7, 11, 19)]
# Each read of a prompt of some 2,000 tokens takes both sides together about 1.5 s: time enough to break something.
SLOW = {"page_s": 0.1}
STOCK_TRANSFER_FAILED = "Failed to get kvcache from prefill instance"


class Faults:
    """The cluster, and what tests do to it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        assert cluster.store is not None
        pages = Path(cluster.store.environment["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"])
        self._file = pages.parent / "faults.json"
        self.asked_again = False
        self.expected = [ask_pair(cluster, tokens) for tokens in PROMPTS]

    def set(self, **faults: object) -> None:
        """Faults of the store by role; none for a role that is not named."""
        self._file.write_text(json.dumps(faults))

    @contextmanager
    def counted(self) -> Iterator[list[Counters]]:
        """Yields a list that holds, afterwards, what was counted meanwhile."""
        before = count(self.cluster)
        seen: list[Counters] = []
        yield seen
        seen.append(count(self.cluster).since(before))

    def once_reading(self, *roles: str) -> Callable[[], None]:
        """What waits, when called, until each of these servers has read a chunk of slow pages, and is at the next."""

        def pages(role: str) -> int:
            return int(json.loads((self._file.parent / f"delays-{role}.0").read_text()).get("page_s", 0))

        before = {role: pages(role) for role in roles}

        def wait() -> None:
            deadline = time.monotonic() + 20
            while any(pages(role) <= before[role] + CHUNK_PAGES for role in roles):
                assert time.monotonic() < deadline, f"not all of {', '.join(roles)} read slowly"
                time.sleep(0.05)

        return wait

    def unaccounted(self) -> list[str]:
        """What is wrong with the pages of the DualPath servers. Empties their caches, but does not flush."""
        return unaccounted(self._file.parent, ("prefill.0", "decode.0"))

    def flush(self) -> None:
        self.set()
        self.cluster.flush(deadline_s=30)

    def nft(self, node: str, rule: str) -> None:
        """Drop what ``rule`` matches of what ``node`` sends; ``heal`` ends it."""
        assert self.cluster.network is not None
        namespace = self.cluster.network.nodes[node].namespace
        for command in (
            "add table inet faults",
            "add chain inet faults out { type filter hook output priority 0; }",
            f"add rule inet faults out {rule} drop",
        ):
            subprocess.run(["ip", "netns", "exec", str(namespace), "nft", command], check=True, timeout=10)

    def heal(self, node: str) -> None:
        assert self.cluster.network is not None
        namespace = self.cluster.network.nodes[node].namespace
        subprocess.run(
            ["ip", "netns", "exec", str(namespace), "nft", "delete table inet faults"], check=False, timeout=10
        )

    def control_port(self) -> int:
        """TCP port of the prefill engine's control socket."""
        line = next(line for line in self.cluster.server_log("prefill").splitlines() if "control tcp://" in line)
        return int(line.split("control tcp://")[1].split(",")[0].rpartition(":")[2])


@pytest.fixture(scope="module", params=TRANSFERS)
def faults(request: pytest.FixtureRequest, model_path: Callable[[Model], Path]) -> Iterator[Faults]:
    flags = (
        "--dualpath-policy", "tests.e2e.policies:Sharing", "--dualpath-chunk-bytes", str(CHUNK_PAGES << 17),
        "--dualpath-hello-silence", str(SILENCE_S), "--dualpath-read-deadline", str(DEADLINE_S),
        "--dualpath-lease", str(LEASE_S),
    )  # fmt: skip

    def server(role: str, name: str, connector: str | None = "dualpath", **env: str) -> ServerSpec:
        return ServerSpec(
            role=role,  # type: ignore[arg-type]
            name=name,
            kv_connector=connector,
            hicache=connector is not None or role == "prefill",
            transfer_backend=request.param,
            extra_flags=flags if connector else (),
            extra_env={ROLE_ENV: role, "PYTHONPATH": str(REPOSITORY), **env},
            **SETTINGS,  # type: ignore[arg-type]
        )

    spec = ClusterSpec(
        model=model_path("gqa"),
        servers=[
            server("prefill", "prefill"),
            server("decode", "decode"),
            server("decode", "plain", connector=None),
        ],
        store=StoreSpec(kind="dynamic", extra_config=BACKEND),
        router=None,
        network=NetworkSpec(snic_bits_per_s=None, cnic_bits_per_s=None),
    )
    with Cluster(spec, log_dir=log_dir(f"faults-{request.param}")) as cluster:
        faults = Faults(cluster)
        faults.flush()
        yield faults


@pytest.fixture(autouse=True)
def whole_again(faults: Faults) -> Iterator[None]:
    """After each test no page is lost, and the reserve, threads and descriptors are what they were before it."""
    faults.flush()
    faults.set()
    assert ask_pair(faults.cluster, PROMPTS[0]) == faults.expected[0]
    faults.flush()
    before = _resources(faults.cluster)
    yield
    faults.heal("decode")
    faults.set()
    lost = faults.unaccounted()
    faults.flush()
    assert lost == []
    deadline = time.monotonic() + 20
    while (left := _leaks(before, _resources(faults.cluster), count(faults.cluster))) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []


def _resources(cluster: Cluster) -> dict[str, tuple[int, int]]:
    """Threads and descriptors of each DualPath server's processes."""
    found = {}
    for name in ("prefill", "decode"):
        root = psutil.Process(cluster.processes[name].pid)
        tree = [root, *root.children(recursive=True)]
        found[name] = (sum(process.num_threads() for process in tree), sum(process.num_fds() for process in tree))
    return found


def _leaks(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], now: Counters) -> list[str]:
    problems = []
    for name, (threads, descriptors) in after.items():
        # HTTP keep-alive connections and idle worker threads come and go by a few.
        if threads > before[name][0] + 4:
            problems.append(f"{name}: {threads} threads, {before[name][0]} before")
        if descriptors > before[name][1] + 16:
            problems.append(f"{name}: {descriptors} descriptors, {before[name][1]} before")
    for state in ("backing", "quarantined"):
        slots = now.total("reserve_slots", state, server="prefill")
        if slots:
            problems.append(f"{slots} reserve slots {state}")
    return problems


def timed(faults: Faults, tokens: Sequence[int], **where: str) -> tuple[tuple[int, ...], float]:
    start = time.monotonic()
    answer = ask_pair(faults.cluster, tokens, **where)
    return answer, time.monotonic() - start


def timed_after_restart(
    faults: Faults, tokens: Sequence[int], request: pytest.FixtureRequest
) -> tuple[tuple[int, ...], float]:
    """As `timed`, for the first request to a decode server started anew, once more if its transfer failed.

    In one of some forty restarts the prefill server's first transfer to the new server, SGLang's own, failed at once.
    The cause is not known. The run's summary then shows what the servers logged, and a second time in one run fails.
    Both tries count as one, in time, too.
    """
    start = time.monotonic()
    try:
        return timed(faults, tokens)
    except RequestError as error:
        if STOCK_TRANSFER_FAILED not in str(error) or faults.asked_again:
            raise
        faults.asked_again = True
        request.config.pluginmanager.get_plugin("server-logs").note(f"{request.node.nodeid}, which asked once more")
        faults.cluster.flush(deadline_s=30)
        return ask_pair(faults.cluster, tokens), time.monotonic() - start


@pytest.mark.parametrize(("role", "reason"), [("decode", "storage_exception"), ("prefill", "storage_exception")])
def test_storage_read_errors_on_one_side(faults: Faults, role: str, reason: str) -> None:
    with faults.counted() as seen:
        faults.set(**{role: {"error": True}, "decode" if role == "prefill" else "prefill": SLOW})
        answer, seconds = timed(faults, PROMPTS[1])
    assert answer == faults.expected[1]
    assert seconds < DEADLINE_S + 5
    assert seen[0].total("fallbacks_total", reason) > 0


def test_pages_evicted_between_query_and_read(faults: Faults) -> None:
    with faults.counted() as seen:
        faults.set(prefill={"lose": 5}, decode={"lose": 5})
        answer, seconds = timed(faults, PROMPTS[1])
    assert answer == faults.expected[1]
    assert seconds < DEADLINE_S + 5
    assert seen[0].total("requests_total", "short") > 0


def test_a_decode_server_without_the_flag(faults: Faults) -> None:
    with faults.counted() as seen:
        answer, seconds = timed(faults, PROMPTS[2], decode="plain")
    assert answer == faults.expected[2]
    assert seconds < SILENCE_S + 15
    assert seen[0].total("read_bytes_total", "prefill") > 0
    assert seen[0].total("fallbacks_total", "no_hello") > 0


def test_a_decode_engine_frozen_in_its_read_and_woken(faults: Faults) -> None:
    faults.set(prefill=SLOW, decode=SLOW)
    decode = faults.cluster.processes["decode"]

    reads = faults.once_reading("decode")

    def freeze() -> None:
        reads()
        decode.signal(signal.SIGSTOP)
        time.sleep(4)
        decode.signal(signal.SIGCONT)

    thread = threading.Thread(target=freeze)
    with faults.counted() as seen:
        thread.start()
        answer, seconds = timed(faults, PROMPTS[1])
        thread.join()
    assert answer == faults.expected[1]
    assert seconds < DEADLINE_S + 5
    assert seen[0].total("fallbacks_total", "lease_expired") > 0


def test_pushes_that_do_not_arrive(faults: Faults) -> None:
    """Large packets to the prefill server vanish: control messages pass, pages do not."""
    assert faults.cluster.network is not None
    target = faults.cluster.network.nodes["prefill"].compute_address
    with faults.counted() as seen:
        faults.set(prefill=SLOW, decode=SLOW)
        faults.nft("decode", f"ip daddr {target} meta length > 900")
        try:
            thread = threading.Timer(6, lambda: faults.heal("decode"))
            thread.start()
            answer, seconds = timed(faults, PROMPTS[1])
            thread.join()
        finally:
            faults.heal("decode")
    assert answer == faults.expected[1]
    assert seconds < DEADLINE_S + 5
    assert seen[0].total("fallbacks_total", "lease_expired") + seen[0].total("fallbacks_total", "push_failed") > 0


def test_a_hello_that_never_comes(faults: Faults) -> None:
    port = faults.control_port()
    with faults.counted() as seen:
        faults.nft("decode", f"tcp dport {port}")
        try:
            answer, seconds = timed(faults, PROMPTS[3])
        finally:
            faults.heal("decode")
    assert answer == faults.expected[3]
    assert seconds < SILENCE_S + 10
    assert seen[0].total("fallbacks_total", "prefill_silent") > 0


def test_abort_in_the_middle_of_a_read_and_a_flush_after_it(faults: Faults) -> None:
    faults.set(prefill=SLOW, decode=SLOW)
    results: list[object] = []

    def ask() -> None:
        try:
            results.append(ask_pair(faults.cluster, PROMPTS[1]))
        except RequestError as error:
            results.append(error)

    thread = threading.Thread(target=ask)
    both_read = faults.once_reading("prefill", "decode")
    with faults.counted() as seen:
        thread.start()
        both_read()
        for name in ("prefill", "decode"):
            faults.cluster.clients[name].post("/abort_request", {"abort_all": True})
        thread.join(20)
        start = time.monotonic()
        faults.cluster.flush(deadline_s=20)
        flushed_s = time.monotonic() - start
    assert isinstance(results[0], RequestError)
    assert flushed_s < 10
    assert seen[0].total("read_bytes_total") > 0, "the abort was meant to come while reads were in flight"
    faults.set()
    assert ask_pair(faults.cluster, PROMPTS[1]) == faults.expected[1]


def test_a_decode_engine_killed_in_its_read(faults: Faults, request: pytest.FixtureRequest) -> None:
    """Takes a new decode server: the request fails as it would with stock, the prefill server goes on."""
    faults.set(prefill=SLOW, decode=SLOW)
    cluster = faults.cluster
    thread = threading.Timer(0.9, lambda: cluster.processes["decode"].signal(signal.SIGKILL))
    thread.start()
    with pytest.raises(RequestError):
        ask_pair(cluster, PROMPTS[1])
    thread.join()
    cluster.clients["prefill"].post("/abort_request", {"abort_all": True})
    faults.set()
    answer, _ = timed(faults, PROMPTS[2], decode="plain")
    assert answer == faults.expected[2]
    cluster.restart("decode")
    faults.flush()
    # So slow that a server which has just been started is still of help.
    faults.set(prefill={"page_s": 0.3}, decode=SLOW)
    with faults.counted() as seen:
        answer, _ = timed_after_restart(faults, PROMPTS[1], request)
    assert answer == faults.expected[1]
    assert seen[0].total("read_bytes_total", "decode") > 0


def test_a_decode_server_of_another_version(faults: Faults, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Servers are upgraded one after the other: the two speak, find that they differ, and the request goes on."""
    (tmp_path / "sitecustomize.py").write_text("import sglang_dualpath\nsglang_dualpath.__version__ = '0.0.0+other'\n")
    faults.cluster.restart("decode", extra_env={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"})
    with faults.counted() as seen:
        answer, seconds = timed_after_restart(faults, PROMPTS[3], request)
    assert answer == faults.expected[3]
    assert seconds < DEADLINE_S + 5
    assert seen[0].total("fallbacks_total", "package_version") > 0
    assert seen[0].total("read_bytes_total", "prefill") > 0
    assert seen[0].total("read_bytes_total", "decode") == 0
