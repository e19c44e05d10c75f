"""The systems that are compared, and the memory that comparing them takes.

    sgl_mc            stock SGLang, HiCache and Mooncake store on the prefill servers: what most deployments run
    sgl_mc_both       the same on the decode servers too: they read, keep and write back as well
    sgl_mc_default    sgl_mc with SGLang's default prefetch policy, which gives a slow read up: shown, not compared with
    dualpath:POLICY   this package on both, with a policy; +NAME=VALUE adds a flag of its, as in
                      dualpath:split+reader-threads=4
    oracle            stock whose prefill server holds every hit in device memory: nothing is ever loaded

All have the same pools (the oracle's prefill server a larger one), the same environment and the same idle flags.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.compare.schema import Settings
from benchmarks.load.workload import Workload
from benchmarks.testbed import KV_BYTES_PER_TOKEN, PAGE_TOKENS, ClusterSpec, NetworkSpec, ServerSpec, StoreSpec
from benchmarks.testbed.cluster import ROUTER_MEMORY_BYTES

SHOWN_ONLY = frozenset({"sgl_mc_default"})  # loses hits by design, so it is in no check of equal work
STOCK = ("sgl_mc", "sgl_mc_both", "sgl_mc_default", "oracle")
BASE_REQUESTS = 3  # lone ones, whose median TTFT read times are reckoned from
_STORE_FILL_SHARE = 0.85  # a Mooncake store evicts above 0.9 of its capacity, and its allocator leaves gaps


class UnknownSystemError(ValueError):
    """A system or a combination that cannot be built; the message is one sentence for the user."""


def check_systems(settings: Settings) -> None:
    """Raises UnknownSystemError for a name that is none, twice the same, or an oracle where it cannot be one."""
    if not settings.systems or len(set(settings.systems)) != len(settings.systems):
        raise UnknownSystemError("Name at least one system, and none twice.")
    for name in settings.systems:
        if name not in STOCK and not (name.startswith("dualpath:") and name.removeprefix("dualpath:")):
            raise UnknownSystemError(f"There is no system {name!r}: take {', '.join(STOCK)} or dualpath:POLICY.")
        if is_dualpath(name):
            dualpath_flags(name)
    if "oracle" in settings.systems and settings.mode == "online":
        raise UnknownSystemError("Caches are dropped between waves, and the oracle lives from them: leave it out.")
    if "oracle" in settings.systems and settings.prefill_servers > 1:
        raise UnknownSystemError("The oracle needs one prefill server: with more, a router sends agents to either.")


def is_dualpath(system: str) -> bool:
    return system.startswith("dualpath:")


def policy_of(system: str) -> str | None:
    """The policy in `dualpath:POLICY+NAME=VALUE…`; None for stock."""
    return system.removeprefix("dualpath:").split("+")[0] if is_dualpath(system) else None


def dualpath_flags(system: str) -> tuple[str, ...]:
    """Flags of `dualpath:POLICY+NAME=VALUE…`. Raises UnknownSystemError for an addition that is none."""
    policy, *additions = system.removeprefix("dualpath:").split("+")
    flags = ["--dualpath-policy", policy]
    for addition in additions:
        name, equals, value = addition.partition("=")
        if not (name and equals and value):
            raise UnknownSystemError(f"{system!r}: what follows + must be NAME=VALUE, as in +reader-threads=4.")
        flags += [f"--dualpath-{name}", value]
    return tuple(flags)


def reads_twice(system: str) -> bool:
    """True for stock with HiCache on both sides: each side reads the same hits."""
    return system == "sgl_mc_both"


def server_names(role: str, count: int) -> list[str]:
    """"prefill" alone, else "prefill1", "prefill2", …"""
    return [role] if count == 1 else [f"{role}{number}" for number in range(1, count + 1)]


def cluster_spec(system: str, settings: Settings, workload: Workload, model: Path) -> ClusterSpec:
    """The cluster of a system: servers, store and links."""
    pools = settings.pools
    prefill_tokens, prefill_ratio = pools.prefill_tokens, pools.prefill_ratio
    if system == "oracle":
        prefill_tokens, prefill_ratio = oracle_pool_tokens(settings, workload), 1.1
    connector: str | None = None
    flags: tuple[str, ...] = ()
    if is_dualpath(system):
        connector, flags = "dualpath", dualpath_flags(system)
    elif system == "sgl_mc_default":
        flags = ("--hicache-storage-prefetch-policy", "timeout")  # comes after the testbed's and wins
    prefill = [
        ServerSpec("prefill", name, connector, max_total_tokens=prefill_tokens, hicache_ratio=prefill_ratio,
                   extra_flags=flags)
        for name in server_names("prefill", settings.prefill_servers)
    ]  # fmt: skip
    decode_flags = flags if is_dualpath(system) else ()
    decode = [
        ServerSpec("decode", name, connector, hicache=system == "sgl_mc_both" or is_dualpath(system),
                   max_total_tokens=pools.decode_tokens, hicache_ratio=pools.decode_ratio, extra_flags=decode_flags)
        for name in server_names("decode", settings.decode_servers)
    ]  # fmt: skip
    network = None
    if settings.namespaces:
        network = NetworkSpec(_bits(settings.snic_mbit), _bits(settings.cnic_mbit))
    return ClusterSpec(
        model=model,
        servers=(*prefill, *decode),
        store=StoreSpec(capacity_bytes=store_bytes(settings, workload, KV_BYTES_PER_TOKEN)),
        network=network,
    )


def oracle_pool_tokens(settings: Settings, workload: Workload) -> int:
    """Every prompt with what is generated, in whole pages, and a chunk of room: nothing is evicted."""
    pages = sum(-(-(max(round_.prompt_tokens + round_.generated_tokens for round_ in trajectory.rounds)) // PAGE_TOKENS)
                + 2 for trajectory in workload.trajectories)  # fmt: skip
    new_pages = settings.passes * workload.requests * (settings.appended_tokens // PAGE_TOKENS + 2)
    return (pages + new_pages) * PAGE_TOKENS + 8192


def warm_up_agent(workload: Workload) -> int:
    """The agent whose first round warms servers up: the one with most hits."""
    return max(range(len(workload.trajectories)), key=lambda agent: workload.hit_tokens(agent, 0, PAGE_TOKENS))


def warm_up_requests(settings: Settings) -> int:
    """Before each turn: two through every server, and those that show how long one takes that loads nothing."""
    return 2 * max(settings.prefill_servers, settings.decode_servers) + BASE_REQUESTS


def store_bytes(settings: Settings, workload: Workload, kv_bytes: int) -> int:
    """Capacity of one system's store: contexts, and what every repetition writes back."""
    plays = settings.repetitions * settings.passes
    if settings.mode == "online":
        plays = settings.passes * settings.trial_steps
    # The requests that warm servers up end differently each time, too.
    warm_ups = warm_up_requests(settings)
    agent = warm_up_agent(workload)
    prompt_tokens = workload.trajectories[agent].rounds[0].prompt_tokens
    new_tokens = prompt_tokens - workload.hit_tokens(agent, 0, PAGE_TOKENS) + 3 * PAGE_TOKENS
    tokens = workload.stored_tokens(plays, PAGE_TOKENS) + settings.repetitions * warm_ups * new_tokens
    return max(512 << 20, int(tokens * kv_bytes / _STORE_FILL_SHARE))


def memory_budget(settings: Settings, specs: dict[str, ClusterSpec]) -> dict[str, int]:
    """Expected bytes by part: all stores at once, but the servers of one system at a time (the largest)."""
    servers = {
        system: sum(server.memory_bytes(KV_BYTES_PER_TOKEN) for server in spec.servers)
        for system, spec in specs.items()
    }
    largest = max(servers, key=lambda system: servers[system])
    budget = {f"servers of {largest}": servers[largest]}
    for system, spec in specs.items():
        budget[f"store of {system}"] = spec.store.memory_bytes if spec.store is not None else 0
    return budget | {"router": ROUTER_MEMORY_BYTES, "this program": 300 << 20}


def _bits(mbit: int | None) -> int | None:
    return None if mbit is None else mbit * 1_000_000
