"""What a policy is asked, what it sees, what it answers. All of it immutable, so that a decision can be replayed."""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import msgspec

EngineId: TypeAlias = str
"""Names one engine (one scheduler rank of one server) for as long as its process lives."""

ReadEnd: TypeAlias = Literal["front", "back", "any"]
"""From which end of a read a reader claims. Only a front reader can keep what it reads as a prefix of its own."""

DEFAULT_CHUNK_BYTES = 4 * 1024 * 1024
"""Payload that one claim asks for: a few ms on a 400 Gbit/s NIC, long enough to hide a control round trip."""


class Role(StrEnum):
    """What an engine is there for."""

    PREFILL = "prefill"
    DECODE = "decode"
    HELPER = "helper"


class EngineView(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's load, as it was `age_s` seconds ago. Rates are measured payload rates, None before the first one."""

    engine: EngineId
    role: Role
    node: str = ""
    """The node whose storage NIC the engine reads through, shared with all that name the same. Empty: its own."""
    queued_read_bytes: int = 0
    """Bytes this engine has still to read from storage."""
    read_bytes_per_s: float | None = None
    hop_bytes_per_s: float | None = None
    """Rate of its pushes to another engine's host memory."""
    requests_in_flight: int = 0
    tokens_in_flight: int = 0
    free_kv_tokens: int | None = None
    age_s: float = 0.0


class ClusterView:
    """The engines that a policy may know of, indexed. Read-only; an engine that never reported is not in it."""

    __slots__ = ("_by_role", "_engines", "_queued_by_node")

    def __init__(self, engines: Iterable[EngineView] = ()) -> None:
        """Raises ValueError when two views name the same engine."""
        indexed: dict[EngineId, EngineView] = {}
        by_role: dict[Role, list[EngineView]] = {role: [] for role in Role}
        queued_by_node: dict[str, int] = {}
        for view in engines:
            if view.engine in indexed:
                raise ValueError(f"two views of engine {view.engine!r}")
            indexed[view.engine] = view
            by_role[view.role].append(view)
            if view.node:
                queued_by_node[view.node] = queued_by_node.get(view.node, 0) + view.queued_read_bytes
        self._engines = MappingProxyType(indexed)
        self._by_role = {role: tuple(views) for role, views in by_role.items()}
        self._queued_by_node = queued_by_node

    def __repr__(self) -> str:
        return f"ClusterView({list(self._engines.values())!r})"

    @property
    def engines(self) -> Mapping[EngineId, EngineView]:
        return self._engines

    def get(self, engine: EngineId) -> EngineView | None:
        return self._engines.get(engine)

    def of_role(self, role: Role) -> tuple[EngineView, ...]:
        return self._by_role[role]

    def queued_read_bytes(self, engine: EngineId) -> int:
        """Bytes queued at the storage NIC that `engine` reads through: its node's, as engines of a node share one.

        0 for an engine that is not in view.
        """
        view = self._engines.get(engine)
        if view is None:
            return 0
        return self._queued_by_node[view.node] if view.node else view.queued_read_bytes


class ReadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request's pages, to be brought into the prefill engine's host memory."""

    room: int
    prefill: EngineId
    decode: EngineId | None
    """None: not known yet, or a server without DualPath."""
    hit_pages: int
    """Pages that storage holds and the prefill engine does not."""
    page_bytes: int
    """Payload of one page, all layers, one engine."""
    decode_held_pages: int = 0
    """Pages that the decode engine has in host memory and the prefill engine lacks. They cost no storage read there."""
    deadline_s: float = 0.0
    """Seconds left for the read. Policies may prefer a faster plan; the deadline itself is kept elsewhere."""
    chunk_bytes: int = DEFAULT_CHUNK_BYTES

    @property
    def read_bytes(self) -> int:
        """Payload of the hit pages."""
        return self.hit_pages * self.page_bytes


class ReadShare(msgspec.Struct, frozen=True):
    """One reader's part: the end that it claims from, and at most how many pages (None: as many as it gets)."""

    engine: EngineId
    end: ReadEnd
    limit_pages: int | None = None


class ReadPlan(msgspec.Struct, frozen=True):
    """Who may read. Whatever they leave, the prefill engine's own reader takes, so a plan cannot lose a page."""

    shares: tuple[ReadShare, ...]
    reason: str
    """A few words for log and trail: why these readers."""

    def share_of(self, engine: EngineId) -> ReadShare | None:
        return next((share for share in self.shares if share.engine == engine), None)


@runtime_checkable
class BalancingPolicy(Protocol):
    """Chooses the readers of a request, once. Pure: the same arguments give the same plan, and nothing is changed."""

    needs_decode: bool
    """True: planning waits until the decode engine is known, up to the deadline for its first message.

    A policy of which it holds may also set ``reads_ahead = True``: the prefill engine then reads while planning waits,
    as the plan will let it read anyway.
    """

    def plan(self, read: ReadRequest, view: ClusterView) -> ReadPlan: ...


def validate_plan(plan: ReadPlan, read: ReadRequest) -> ReadPlan:
    """Return `plan` if `read` can be read by it.

    Raises ValueError when it names nobody, names an engine twice, has a limit below one page, or lets the decode
    engine claim from the back: it keeps what it reads, and can keep nothing but a prefix.
    """
    if not plan.shares:
        raise ValueError("a plan names no reader")
    named = [share.engine for share in plan.shares]
    twice = sorted({engine for engine in named if named.count(engine) > 1})
    if twice:
        raise ValueError(f"a plan names {twice[0]!r} twice")
    for share in plan.shares:
        if share.limit_pages is not None and share.limit_pages < 1:
            raise ValueError(f"a plan limits {share.engine!r} to {share.limit_pages} pages")
        if share.engine == read.decode and share.end == "back":
            raise ValueError("a plan lets the decode engine claim from the back, where it cannot keep a prefix")
    return plan


def prefill_alone(read: ReadRequest, reason: str) -> ReadPlan:
    """The plan that every policy falls back to: the prefill engine reads its own pages, as without DualPath."""
    return ReadPlan((ReadShare(read.prefill, "back"),), reason)
