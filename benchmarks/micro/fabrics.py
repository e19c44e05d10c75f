"""Transfer engines that the hop can be measured over, each with the product's transport and its own bare write."""

from __future__ import annotations

import importlib.util
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from benchmarks.micro.errors import BenchmarkError
from benchmarks.testbed.store import MOONCAKE_ENVIRONMENT
from sglang_dualpath.transfer import Peer, Transport
from sglang_dualpath.transfer.mooncake import MooncakeTransport
from sglang_dualpath.transfer.nixl import NixlTransport


class Fabric(Protocol):
    """One transfer engine in this process, at an address of this machine."""

    environment: Mapping[str, str]
    """What must be set before it is made."""
    transport: Transport
    """The product's way to it."""

    def meet(self, base: int, peer: Peer, peer_base: int) -> None:
        """Get ready for writes between the memory at these addresses, registered on either side."""

    def write(self, offsets: Sequence[int], length: int) -> None:
        """The engine's own blocking write, in one call, of pieces that lie at the same `offsets` on both sides.

        Each is contiguous, has `length` bytes and begins at a multiple of it. Raises BenchmarkError when it fails.
        """


class _Engine:
    """Mooncake's engine with the interface of SGLang's wrapper, whose module takes ten seconds to import."""

    def __init__(self, host: str) -> None:
        from mooncake.engine import TransferEngine

        self.engine = TransferEngine()
        if self.engine.initialize(host, "P2PHANDSHAKE", "tcp", "") != 0:
            raise BenchmarkError(f"Mooncake's transfer engine does not start at {host}.")
        self._session = f"{host}:{self.engine.get_rpc_port()}"

    def get_session_id(self) -> str:
        return self._session

    def register(self, address: int, length: int) -> None:
        if self.engine.register_memory(address, length) != 0:
            raise RuntimeError("Mooncake memory registration failed")

    def deregister(self, address: int) -> None:
        self.engine.unregister_memory(address)

    def batch_transfer_sync(
        self, session: str, sources: Sequence[int], destinations: Sequence[int], lengths: Sequence[int]
    ) -> int:
        return int(self.engine.batch_transfer_sync_write(session, sources, destinations, lengths))


class MooncakeFabric:
    """Mooncake over TCP."""

    environment: Mapping[str, str] = {**MOONCAKE_ENVIRONMENT, "GLOG_minloglevel": "2"}

    def __init__(self, host: str) -> None:
        self._engine = _Engine(host)
        self.transport: Transport = MooncakeTransport(self._engine)

    def meet(self, base: int, peer: Peer, peer_base: int) -> None:
        self._session, self._base, self._peer_base = peer.session, base, peer_base

    def write(self, offsets: Sequence[int], length: int) -> None:
        status = self._engine.engine.batch_transfer_sync_write(
            self._session,
            [self._base + offset for offset in offsets],
            [self._peer_base + offset for offset in offsets],
            [length] * len(offsets),
        )
        if status < 0:
            raise BenchmarkError(f"Mooncake reported {status} for a write of {length} bytes.")


class NixlFabric:
    """NIXL over UCX, with an agent as SGLang makes it. `UCX_TLS` says over what: shared memory if it does not."""

    environment: Mapping[str, str] = {"NIXL_LOG_LEVEL": "ERROR"}

    def __init__(self, host: str) -> None:
        from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t

        del host  # UCX tells its peers all addresses that it has
        config = nixl_agent_config(backends=["UCX"], sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT)
        self.agent = nixl_agent(str(uuid.uuid4()), config)
        self.transport: Transport = NixlTransport(self.agent)
        self._blocks: dict[int, tuple[Any, Any]] = {}

    def meet(self, base: int, peer: Peer, peer_base: int) -> None:
        self.agent.add_remote_agent(peer.metadata)
        self._session, self._base, self._peer_base = peer.session, base, peer_base
        self._size_bytes = sum(length for _, length in peer.pool.regions())
        self._blocks.clear()

    def write(self, offsets: Sequence[int], length: int) -> None:
        if length not in self._blocks:
            self._blocks[length] = (
                self._prepare("", self._base, length),
                self._prepare(self._session, self._peer_base, length),
            )
        ours, theirs = self._blocks[length]
        indices = np.array([offset // length for offset in offsets], dtype=np.int32)
        handle = self.agent.make_prepped_xfer("WRITE", ours, indices, theirs, indices)
        state = self.agent.transfer(handle)
        while state == "PROC":
            time.sleep(0)  # as SGLang waits for its own transfers
            state = self.agent.check_xfer_state(handle)
        handle.release()
        if state != "DONE":
            raise BenchmarkError(f"NIXL reported {state} for a write of {length} bytes.")

    def _prepare(self, agent: str, base: int, length: int) -> Any:
        run = np.array([(base, length, 0, length, self._size_bytes // length)], dtype=np.uint64)
        return self.agent.prep_xfer_dlist(agent, run, "DRAM")


FABRICS: Mapping[str, type[Any]] = {"mooncake": MooncakeFabric, "nixl": NixlFabric}
_MISSING = {
    "mooncake": "Mooncake is missing: install mooncake-transfer-engine or its non-cuda build.",
    "nixl": "NIXL is missing: install the package `nixl`.",
}


def fabric(name: str) -> type[Any]:
    """The class by that name. Raises BenchmarkError with the sentence that says why there is none."""
    if importlib.util.find_spec(name) is None:
        raise BenchmarkError(_MISSING[name])
    return FABRICS[name]
