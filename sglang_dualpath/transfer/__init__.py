"""The hop's transport: register a host pool, write its pages into a peer's host pool."""

from sglang_dualpath.transfer.base import (
    Descriptor,
    Peer,
    PlaneGeometry,
    PoolGeometry,
    Transport,
    check_layouts,
    coalesce,
    push_plan,
)
from sglang_dualpath.transfer.memory import MemoryTransport

__all__ = [
    "Descriptor",
    "MemoryTransport",
    "Peer",
    "PlaneGeometry",
    "PoolGeometry",
    "Transport",
    "check_layouts",
    "coalesce",
    "push_plan",
]
