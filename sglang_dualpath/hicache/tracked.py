"""What a decode engine's path knows of a request, from its acceptance until its read is over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from sglang_dualpath.reader.decode import DecodeRead


class HostLock(NamedTuple):
    """A host lock on a tree node and its ancestors, with what releases it."""

    node: Any
    receipt: Any


@dataclass(eq=False)
class Tracked:
    """A request from its acceptance until nothing of its read touches host memory, on any rank.

    Its fields change in the same iteration on every rank.
    """

    read: DecodeRead
    req: Any
    """None once the request has left."""
    receiver: Any
    """No other sample in the same room has it."""
    held: HostLock | None
    """The lock on what HELLO named."""
    asks: bool = True
    """SGLang is to be asked for a prefetch when there is an offer."""
    is_parked: bool = False
    """SGLang had no room for its prefetch when it was asked last."""
