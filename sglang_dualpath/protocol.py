"""What prefill and decode servers say to each other about one read, as versioned `msgspec` structs in msgpack.

    decode -> prefill   Hello   Decline   Claim   Done   Fail   Cancelled   Settled   Bye
    prefill -> decode   Offer   Queued   NoOffer   Grant   Refuse   Cancel

A read opens with Hello, which is answered by exactly one of Offer and NoOffer, possibly after some Queued. An Offer
leads to Claim -> Grant | Refuse, and every Grant ends in Done, Fail or Cancelled: the *last word* of its writer, after
which it writes no more into the granted slots. Settled or Bye closes the read.

Nothing here trusts the other side: every number has a range, every string and sequence a length, and `decode` raises
`ProtocolError` for whatever lies outside. What only the receiver can judge (is that claim open? is that slot in the
range that was offered?) is left to the receiver.

Terms: `page` is the absolute index of a page in the prompt, `slot` the number of a page in the prefill engine's host
pool, `room` the request, `attempt` one prefetch of it. All byte counts are those of one engine (one rank).

Compatibility: unknown fields are ignored, so that a field with a default may be added within a version. Any other
change raises `PROTOCOL_VERSION`. Keep `Hello.room` and `Hello.version` for ever: an older server must be able to refuse
a newer one by name.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final

import msgspec
from msgspec import Meta

PROTOCOL_VERSION: Final = 1
#: Upper bound of one encoded message. The largest legal ones, an Offer with MAX_METADATA_BYTES and a Grant of
#: MAX_GRANT_PAGES slots, take about 65 and 20 KiB.
MAX_MESSAGE_BYTES: Final = 256 * 1024
MAX_GRANT_PAGES: Final = 4096
MAX_PLANES: Final = 8
MAX_SESSION_CHARS: Final = 256
MAX_REASON_CHARS: Final = 256
#: What a transfer engine says of itself: addresses on each NIC and keys of the host pool, a few KiB with many NICs.
MAX_METADATA_BYTES: Final = 64 * 1024

_INT63: Final = 2**63 - 1

Room = Annotated[int, Meta(ge=0, le=_INT63)]
Attempt = Annotated[int, Meta(ge=0, le=2**31)]
#: A page index, an exclusive end of pages, or a number of pages.
Pages = Annotated[int, Meta(ge=0, le=2**31)]
Slot = Annotated[int, Meta(ge=0, le=2**31)]
Id = Annotated[int, Meta(ge=0, le=_INT63)]
Bytes = Annotated[int, Meta(ge=0, le=_INT63)]
Address = Annotated[int, Meta(ge=0, le=_INT63)]
PageBytes = Annotated[int, Meta(ge=1, le=2**40)]
GrantPages = Annotated[int, Meta(ge=1, le=MAX_GRANT_PAGES)]
#: A duration. As with every number here, the bounds also keep out NaN and infinity, which msgpack can carry.
Seconds = Annotated[float, Meta(ge=0.0, le=86400.0)]
BytesPerSecond = Annotated[float, Meta(ge=0.0, le=1e15)]
Reason = Annotated[str, Meta(max_length=MAX_REASON_CHARS)]
#: Printable ASCII without blanks: it is a ZMQ routing id, a log word and a metric label at once.
EngineName = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"\A[!-~]+\Z")]


class ProtocolError(ValueError):
    """A message cannot be sent or was received malformed, too large or out of range. One sentence says which."""


class VersionMismatchError(ProtocolError):
    """A Hello of another protocol version whose fields this version cannot read; `room` is where to answer it."""

    def __init__(self, version: int, room: int) -> None:
        super().__init__(f"The peer speaks control protocol version {version}; this server speaks {PROTOCOL_VERSION}.")
        self.version = version
        self.room = room


class NoOfferReason(enum.StrEnum):
    """Why a prefill server offers nothing for a request."""

    NO_HITS = "no_hits"
    NOT_ASKED = "not_asked"
    BELOW_THRESHOLD = "below_threshold"
    POLICY = "policy"
    UNSUPPORTED = "unsupported"
    UNKNOWN = "unknown"
    CLOSED = "closed"
    VERSION = "version"
    RESERVE = "reserve"


class _Message(msgspec.Struct, frozen=True, tag_field="t", tag=str.lower, forbid_unknown_fields=False):
    """Base of all messages; the tag on the wire is the class name in lower case."""

    room: Room


class _AttemptMessage(_Message, frozen=True, tag=str.lower):
    attempt: Attempt


class Plane(msgspec.Struct, frozen=True):
    """One plane of a host pool (keys, values, or both): slot k lies at `base + k * stride_bytes`, `page_bytes` long."""

    base: Address
    stride_bytes: PageBytes
    page_bytes: PageBytes

    def __post_init__(self) -> None:
        if self.page_bytes > self.stride_bytes:
            raise ProtocolError("A page of a plane is larger than its stride.")

    def address(self, slot: int) -> int:
        """First byte of `slot`."""
        return self.base + slot * self.stride_bytes


class Target(msgspec.Struct, frozen=True):
    """Where a hop may write: the prefill engine's transfer session and the planes of its host pool of `slots` pages.

    `metadata` is what the decode engine's transfer engine must know of the session besides its name: empty for engines
    that need nothing, and for a decode engine whose Hello named the session.
    """

    session: Annotated[str, Meta(min_length=1, max_length=MAX_SESSION_CHARS)]
    planes: Annotated[tuple[Plane, ...], Meta(min_length=1, max_length=MAX_PLANES)]
    slots: Annotated[int, Meta(ge=1, le=2**31)]
    metadata: Annotated[bytes, Meta(max_length=MAX_METADATA_BYTES)] = b""

    def __post_init__(self) -> None:
        if any(plane.address(self.slots) > _INT63 for plane in self.planes):
            raise ProtocolError("A plane ends beyond the address space.")


class Hello(_Message, frozen=True, tag=str.lower):
    """A decode engine has accepted `room`: who it is, how its pages look, and what it holds.

    `engine` is unique per process start. `match_pages` leading pages are in its radix cache at all; pages
    [0, `held_end_page`) are in its host memory, so that they cost no storage read. `plane_bytes` are the page bytes of
    each plane. `session` is the transfer session of which an earlier offer of this prefill engine has told it all.
    """

    version: Annotated[int, Meta(ge=0, le=2**31)]
    package: Annotated[str, Meta(max_length=64)]
    rank: Annotated[int, Meta(ge=0, le=2**16)]
    engine: EngineName
    page_tokens: Annotated[int, Meta(ge=1, le=2**20)]
    page_bytes: PageBytes
    plane_bytes: Annotated[tuple[PageBytes, ...], Meta(min_length=1, max_length=MAX_PLANES)]
    tp_size: Annotated[int, Meta(ge=1, le=2**16)]
    match_pages: Pages
    held_end_page: Pages
    queued_read_bytes: Bytes = 0
    read_bytes_per_s: BytesPerSecond | None = None
    hop_bytes_per_s: BytesPerSecond | None = None
    session: Annotated[str, Meta(max_length=MAX_SESSION_CHARS)] = ""


class Offer(_AttemptMessage, frozen=True, tag=str.lower):
    """The pages [`first_page`, `end_page`) may be claimed; those from `storage_end_page` on are in no storage.

    `end_hash` is the hash of page `end_page` - 1: equal hashes mean equal prompts up to there. A granted claim must
    be finished within `lease_s`, and this reader gets at most `limit_pages` pages (None: no limit) in chunks of about
    `chunk_pages`.
    """

    first_page: Pages
    end_page: Pages
    storage_end_page: Pages
    end_hash: Annotated[str, Meta(max_length=128)]
    target: Target
    lease_s: Seconds
    chunk_pages: GrantPages
    limit_pages: Pages | None
    engine: EngineName

    def __post_init__(self) -> None:
        if self.first_page >= self.end_page:
            raise ProtocolError("An offer must span at least one page.")


class Queued(_Message, frozen=True, tag=str.lower):
    """The request is known, an answer is not possible yet; counts as a sign of life."""

    reason: Reason


class NoOffer(_Message, frozen=True, tag=str.lower):
    """There will be no offer for this request."""

    reason: NoOfferReason


class Decline(_AttemptMessage, frozen=True, tag=str.lower):
    """The offer is not taken; the prefill engine reads alone."""

    reason: Reason


class Claim(_AttemptMessage, frozen=True, tag=str.lower):
    """Asks for the next chunk; `request_id` is chosen by the decode engine and comes back in the answer."""

    request_id: Id
    max_pages: GrantPages


class Grant(_AttemptMessage, frozen=True, tag=str.lower):
    """Pages [`first_page`, `first_page` + len(`slots`)) are this reader's, to be written into `slots` within `lease_s`.

    `memory`: the reader holds these pages in its own host memory and pushes them from there, without a storage read.
    """

    request_id: Id
    claim_id: Id
    first_page: Pages
    slots: Annotated[tuple[Slot, ...], Meta(min_length=1, max_length=MAX_GRANT_PAGES)]
    memory: bool
    lease_s: Seconds

    def __post_init__(self) -> None:
        if len(set(self.slots)) != len(self.slots):
            raise ProtocolError("A grant names a slot twice.")


class Refuse(_AttemptMessage, frozen=True, tag=str.lower):
    """No chunk now; with `retry`, ask again after `retry_after_s`, else this reader has met the others."""

    request_id: Id
    reason: Reason
    retry: bool
    retry_after_s: Seconds = 0.0


class Done(_AttemptMessage, frozen=True, tag=str.lower):
    """The writer's last word on a claim: its first `good_pages` pages have landed, and it writes no more.

    `read_bytes` came out of storage for it and `pushed_bytes` went over the hop; then the load of the reader right now.
    """

    claim_id: Id
    good_pages: Annotated[int, Meta(ge=0, le=MAX_GRANT_PAGES)]
    read_bytes: Bytes
    pushed_bytes: Bytes
    queued_read_bytes: Bytes = 0
    read_bytes_per_s: BytesPerSecond | None = None
    hop_bytes_per_s: BytesPerSecond | None = None


class Fail(_AttemptMessage, frozen=True, tag=str.lower):
    """The writer's last word on a claim: nothing of it counts, and it writes no more."""

    claim_id: Id
    reason: Reason


class Cancel(_AttemptMessage, frozen=True, tag=str.lower):
    """Stop writing for this claim, or all of the attempt (None), and say Cancelled, Done or Fail for each."""

    claim_id: Id | None = None


class Cancelled(_AttemptMessage, frozen=True, tag=str.lower):
    """The writer's last word on a claim that was cancelled: it writes no more."""

    claim_id: Id


class Settled(_AttemptMessage, frozen=True, tag=str.lower):
    """The decode engine has finished with this read and keeps its first `kept_pages` pages."""

    kept_pages: Pages


class Bye(_AttemptMessage, frozen=True, tag=str.lower):
    """The request is gone on the decode side."""


DecodeToPrefill = Hello | Decline | Claim | Done | Fail | Cancelled | Settled | Bye
PrefillToDecode = Offer | Queued | NoOffer | Grant | Refuse | Cancel
Message = DecodeToPrefill | PrefillToDecode


class _HelloEnvelope(msgspec.Struct, frozen=True, tag_field="t", tag="hello"):
    """What every version of Hello has."""

    version: Annotated[int, Meta(ge=0, le=2**31)]
    room: Room


_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_HELLO_DECODER = msgspec.msgpack.Decoder(_HelloEnvelope)
# RecursionError: msgspec skips unknown fields recursively. ValueError: UnicodeDecodeError of a string that is no UTF-8.
_DECODE_FAULTS = (msgspec.MsgspecError, ValueError, RecursionError)


def encode(message: Message) -> bytes:
    """The bytes of `message`; raises ProtocolError for one that the other side would reject.

    Checked here and not only there, because the sender's log is where such a bug can be found.
    """
    try:
        payload = _ENCODER.encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as fault:
        raise ProtocolError(f"{type(message).__name__} cannot be encoded: {fault}") from fault
    _decode_checked(payload)
    return payload


def decode(payload: bytes) -> Message:
    """The message in `payload`.

    Raises ProtocolError for anything else, and its subclass VersionMismatchError for a Hello that only another version
    can read.
    """
    try:
        return _decode_checked(payload)
    except ProtocolError:
        envelope = _hello_envelope(payload)
        if envelope is not None and envelope.version != PROTOCOL_VERSION:
            raise VersionMismatchError(envelope.version, envelope.room) from None
        raise


def clip(reason: object) -> str:
    """`reason` as text that fits a `reason` field: one line, encodable, at most MAX_REASON_CHARS characters."""
    text = " ".join(str(reason).encode("utf-8", "replace").decode("utf-8").split())
    return text if len(text) <= MAX_REASON_CHARS else text[: MAX_REASON_CHARS - 3] + "..."


def _decode_checked(payload: bytes) -> Message:
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"A message of {len(payload)} bytes exceeds the {MAX_MESSAGE_BYTES} bytes allowed.")
    try:
        return _DECODER.decode(payload)
    except _DECODE_FAULTS as fault:
        raise ProtocolError(f"Malformed message: {clip(fault)}") from fault


def _hello_envelope(payload: bytes) -> _HelloEnvelope | None:
    if len(payload) > MAX_MESSAGE_BYTES:
        return None
    try:
        return _HELLO_DECODER.decode(payload)
    except _DECODE_FAULTS:
        return None
