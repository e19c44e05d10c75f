"""An agent that does what a test wants, in NIXL's place."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_dualpath.transfer import Peer, PlaneGeometry, PoolGeometry
from sglang_dualpath.transfer.nixl import NixlTransport

POOL = PoolGeometry((PlaneGeometry(1000, 10, 10), PlaneGeometry(5000, 20, 8)), 6)
PEER = Peer("there", b"about there", PoolGeometry((PlaneGeometry(7000, 10, 10), PlaneGeometry(9000, 8, 8)), 4))


def peer_called(name: str) -> Peer:
    return PEER._replace(session=name, metadata=f"about {name}".encode())


# Named as NIXL names them.
class nixlBackendError(Exception):
    pass


class nixlRemoteDisconnectError(Exception):
    pass


class nixlUnknownError(Exception):
    pass


class Handle:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self._log = log

    def release(self) -> None:
        self._log.append(f"release {self.name}")


class Agent:
    """NIXL's interface. `states` are what a write goes through, the last one for ever; an exception is raised."""

    name = "here"

    def __init__(self) -> None:
        self.log: list[str] = []
        self.states: list[str | Exception] = ["DONE"]
        self.moved: list[tuple[list[int], list[int]]] = []
        self.prepared: dict[str, list[list[int]]] = {}
        self.about = b"about here"
        self.loaded_as: bytes | str | None = None
        """What it says that it has loaded; None: what the metadata is about."""
        self.handles = 0
        self.asked = 0

    def register_memory(self, regions: list[tuple[int, int, int, str]], kind: str) -> object:
        self.log.append(f"register {[region[:2] for region in regions]} {kind}")
        return "regions"

    def deregister_memory(self, regions: object) -> None:
        self.log.append(f"deregister {regions}")

    def get_partial_agent_metadata(self, regions: object, connection: bool) -> bytes:
        assert (regions, connection) == ("regions", True)
        return self.about

    def prep_xfer_dlist(self, agent: str, runs: Any, kind: str) -> Handle:
        assert kind == "DRAM"
        assert runs.dtype == np.uint64
        self.prepared[agent] = runs.tolist()
        return Handle(f"pages of {agent or 'here'}", self.log)

    def add_remote_agent(self, metadata: bytes) -> bytes | str:
        self.log.append(f"load {metadata.decode()}")
        about = metadata.removeprefix(b"about ").partition(b"|")[0]
        return about if self.loaded_as is None else self.loaded_as

    def remove_remote_agent(self, agent: str) -> None:
        self.log.append(f"unload {agent}")

    def make_prepped_xfer(self, kind: str, ours: Handle, from_: Any, theirs: Handle, to: Any) -> Handle:
        assert (kind, ours.name) == ("WRITE", "pages of here")
        assert theirs.name != ours.name
        assert from_.dtype == to.dtype == np.int32
        self.moved.append((from_.tolist(), to.tolist()))
        self.handles += 1
        return Handle(f"write {self.handles}", self.log)

    def transfer(self, handle: Handle) -> str:
        return self.check_xfer_state(handle)

    def check_xfer_state(self, handle: Handle) -> str:
        self.asked += 1
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return state


def transport_over(agent: Agent, **settings: Any) -> NixlTransport:
    transport = NixlTransport(agent, **settings)
    transport.register(POOL)
    return transport
