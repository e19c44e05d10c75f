"""The hop's transport: register host memory, write into a peer's host memory."""

from sglang_dualpath.transfer.base import Descriptor, Transport, coalesce
from sglang_dualpath.transfer.memory import MemoryTransport

__all__ = ["Descriptor", "MemoryTransport", "Transport", "coalesce"]
