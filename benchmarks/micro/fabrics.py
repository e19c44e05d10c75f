"""Transfer engines that the hop can be measured over, each with the product's transport and its own bare write."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from benchmarks.micro.errors import BenchmarkError
from benchmarks.testbed.store import MOONCAKE_ENVIRONMENT
from sglang_dualpath.transfer import Transport
from sglang_dualpath.transfer.mooncake import MooncakeTransport


class Fabric(Protocol):
    """One transfer engine in this process, at an address of this machine."""

    environment: Mapping[str, str]
    """What must be set before it is made."""
    transport: Transport
    """The product's way to it."""

    def write(self, session: str, source: int, destination: int, length: int) -> None:
        """The engine's own blocking write of one contiguous piece. Raises BenchmarkError when it fails."""


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

    def write(self, session: str, source: int, destination: int, length: int) -> None:
        status = self._engine.engine.batch_transfer_sync_write(session, [source], [destination], [length])
        if status < 0:
            raise BenchmarkError(f"Mooncake reported {status} for a write of {length} bytes.")


FABRICS: Mapping[str, type[Any]] = {"mooncake": MooncakeFabric}
NAMES = ("mooncake", "nixl")


def fabric(name: str) -> type[Any]:
    """The class by that name. Raises BenchmarkError with the sentence that says why there is none."""
    if name in FABRICS:
        if importlib.util.find_spec("mooncake") is None:
            raise BenchmarkError("Mooncake is missing: install mooncake-transfer-engine or its non-cuda build.")
        return FABRICS[name]
    if name == "nixl" and importlib.util.find_spec("nixl") is None:
        raise BenchmarkError("NIXL is missing: install the package `nixl`.")
    raise BenchmarkError(f"The hop does not push over {name} yet: take --transport mooncake.")
