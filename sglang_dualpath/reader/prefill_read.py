"""What a prefill engine knows of one read, of one request, and of a claim whose writer it still has to hear."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from sglang_dualpath.ledger import Grant, Ledger
from sglang_dualpath.protocol import Hello, NoOfferReason
from sglang_dualpath.reader.prefetch import Prefetch


class Shares(NamedTuple):
    """Who may claim how much of a read, without names: on each rank of a server other engines go by them."""

    decode: bool
    """The decode engine has a share, of at most ``decode_pages`` (None: no limit)."""
    decode_pages: int | None
    prefill_pages: int | None
    """At most so many for the prefill engine's own reader. With 0 it takes only what nobody else does."""


ALONE = Shares(False, None, None)
"""The prefill engine reads everything."""


@dataclass(eq=False)
class PrefillRead:
    """One attempt to read one request's pages."""

    room: int | None
    attempt: int
    prefetch: Prefetch
    ledger: Ledger
    opened_s: float
    deadline_s: float
    decode: str | None = None
    """The decode engine that was offered a share, by its engine id."""
    peer: bytes | None = None
    claims: dict[int, Grant] = field(default_factory=dict)
    """Open claims of the decode engine."""
    progress_s: float = 0.0
    """When the decode engine was last offered or granted pages of this read, or said its last word on some."""
    shares: Shares | None = None
    """What was decided; None while it is not. A share of the decode engine's waits for its HELLO."""
    held: bool = False
    """Own readers were kept off it for the first moments."""
    planned: bool = False
    """Nothing is awaited any more, and who may claim has been told."""
    unheard: bool = False
    """Its HELLO did not come in time, which was counted."""
    own_share: bool = True
    """This engine's own readers have a share; without one they are the fallback for what the decode engine leaves."""
    closed: bool = False

    @property
    def key(self) -> int:
        return id(self.prefetch)

    @property
    def number(self) -> tuple[int | None, int]:
        """Room and attempt, by which decode engines name it."""
        return self.room, self.attempt


@dataclass(eq=False)
class Late:
    """A claim taken from its writer that has not said its last word."""

    peer: bytes | None
    ledger: Ledger
    cancel_again_s: float
    release_s: float | None = None
    """When its slots may be used again although nobody says that all bytes have arrived."""


@dataclass
class Room:
    """What the prefill engine knows of one request."""

    arrived: bool = False
    handles: set[Hashable] = field(default_factory=set)
    """Samples of one request share a room."""
    hello: Hello | None = None
    peer: bytes | None = None
    hello_s: float = 0.0
    spoke_s: float = 0.0
    attempts: int = 0
    read: PrefillRead | None = None
    closed: NoOfferReason | None = None
    parked: bool = False
    """Its prefetch found no room at least once."""
    alone: bool = False
    """Its decode engine cannot or will not help."""
