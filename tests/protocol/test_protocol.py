"""Messages survive the wire; nothing else does."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect as types

from sglang_dualpath import protocol
from sglang_dualpath.protocol import (
    MAX_GRANT_PAGES,
    MAX_MESSAGE_BYTES,
    MAX_METADATA_BYTES,
    PROTOCOL_VERSION,
    Bye,
    Fail,
    Grant,
    Hello,
    Message,
    NoOffer,
    NoOfferReason,
    Offer,
    Plane,
    ProtocolError,
    Target,
    VersionMismatchError,
    clip,
    decode,
    encode,
)
from tests.protocol.strategies import MESSAGE_TYPES, example, messages, outside


def wire(message: Message) -> dict[str, Any]:
    """The message as the plain map that travels."""
    fields = msgspec.msgpack.decode(encode(message))
    assert isinstance(fields, dict)
    return fields


@given(messages)
def test_every_valid_message_survives_the_wire(message: Message) -> None:
    decoded = decode(encode(message))
    assert decoded == message
    assert type(decoded) is type(message)


@pytest.mark.parametrize("struct", MESSAGE_TYPES)
def test_a_message_is_immutable_and_hashable(struct: type[Message]) -> None:
    message = example(struct)
    assert hash(message) == hash(decode(encode(message)))
    with pytest.raises(AttributeError):
        message.room = 1


@pytest.mark.parametrize("struct", MESSAGE_TYPES)
def test_every_field_rejects_values_outside_its_range(struct: type[Message]) -> None:
    fields = types.type_info(struct)
    assert isinstance(fields, types.StructType)
    good = wire(example(struct))
    for field in fields.fields:
        for value in outside(field.type):
            changed = value
            if isinstance(value, dict) and value:  # one wrong field inside an otherwise right struct
                changed = good[field.encode_name] | value
            with pytest.raises(ProtocolError):
                decode(msgspec.msgpack.encode(good | {field.encode_name: changed}))


@pytest.mark.parametrize("struct", MESSAGE_TYPES)
def test_a_message_without_a_required_field_is_rejected(struct: type[Message]) -> None:
    fields = types.type_info(struct)
    assert isinstance(fields, types.StructType)
    good = wire(example(struct))
    for field in fields.fields:
        if field.required:
            with pytest.raises(ProtocolError):
                decode(msgspec.msgpack.encode({name: good[name] for name in good if name != field.encode_name}))


@pytest.mark.parametrize("struct", MESSAGE_TYPES)
def test_unknown_fields_are_ignored(struct: type[Message]) -> None:
    message = example(struct)
    assert decode(msgspec.msgpack.encode(wire(message) | {"added_later": [1, {"a": "b"}]})) == message


@given(st.binary(max_size=512))
def test_arbitrary_bytes_raise_only_protocol_errors(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(payload)


@given(messages, st.data())
def test_mutated_messages_decode_or_raise_only_protocol_errors(message: Message, data: st.DataObject) -> None:
    payload = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(payload)))
        match data.draw(st.sampled_from(["flip", "insert", "cut", "repeat"])):
            case "flip" if position < len(payload):
                payload[position] ^= data.draw(st.integers(1, 255))
            case "insert":
                payload[position:position] = data.draw(st.binary(max_size=8))
            case "cut":
                del payload[position : position + data.draw(st.integers(1, 8))]
            case "repeat":
                payload += payload[position : position + 64]
    try:
        decoded = decode(bytes(payload))
    except ProtocolError:
        return
    assert decode(encode(decoded)) == decoded


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(MESSAGE_TYPES), st.data())
def test_fields_of_any_shape_decode_or_raise_only_protocol_errors(struct: type[Message], data: st.DataObject) -> None:
    good = wire(example(struct))
    changed = good | {name: data.draw(plain) for name in data.draw(st.sets(st.sampled_from(sorted(good)), min_size=1))}
    try:
        decoded = decode(msgspec.msgpack.encode(changed))
    except ProtocolError:
        return
    assert decode(encode(decoded)) == decoded


def test_an_oversized_message_is_rejected_before_it_is_parsed() -> None:
    payload = encode(Bye(room=1, attempt=0)) + b"\xc0" * MAX_MESSAGE_BYTES
    with pytest.raises(ProtocolError, match=f"exceeds the {MAX_MESSAGE_BYTES}"):
        decode(payload)


def test_bytes_after_a_message_are_rejected() -> None:
    with pytest.raises(ProtocolError):
        decode(encode(Bye(room=1, attempt=0)) + b"\xc0")


def test_deep_nesting_in_an_unknown_field_is_rejected() -> None:
    bye = encode(Bye(room=1, attempt=0))
    with pytest.raises(ProtocolError):
        decode(bytes([bye[0] + 1]) + bye[1:] + b"\xa1z" + b"\x91" * 100_000 + b"\x01")


def test_text_that_is_not_utf8_is_rejected() -> None:
    with pytest.raises(ProtocolError):
        decode(encode(Fail(room=1, attempt=0, claim_id=0, reason="slow")).replace(b"slow", b"\xff\xff\xff\xff"))


def test_an_unknown_type_is_rejected() -> None:
    with pytest.raises(ProtocolError):
        decode(msgspec.msgpack.encode({"t": "reboot", "room": 1}))


def test_the_largest_grant_fits_into_a_message() -> None:
    slots = tuple(range(2**31 - MAX_GRANT_PAGES + 1, 2**31 + 1))
    grant = Grant(
        room=2**63 - 1, attempt=2**31, request_id=2**63 - 1, claim_id=2**63 - 1, first_page=2**31, slots=slots,
        memory=True, lease_s=1.0,
    )  # fmt: skip
    assert len(encode(grant)) < MAX_MESSAGE_BYTES / 10


def test_the_largest_offer_fits_into_a_message() -> None:
    plane = Plane(base=2**62, stride_bytes=2**24, page_bytes=2**24)
    target = Target(session="s" * 256, planes=(plane,) * 8, slots=2**31, metadata=bytes(MAX_METADATA_BYTES))
    offer = msgspec.structs.replace(example(Offer), target=target, end_hash="h" * 128, engine="e" * 128)
    assert len(encode(offer)) < MAX_MESSAGE_BYTES / 3


def test_metadata_is_bytes_and_may_be_left_out() -> None:
    known = wire(example(Offer))
    del known["target"]["metadata"]
    offer = decode(msgspec.msgpack.encode(known))
    assert isinstance(offer, Offer)
    assert offer.target.metadata == b""


def test_encode_refuses_what_the_peer_would_refuse() -> None:
    with pytest.raises(ProtocolError, match="room"):
        encode(Bye(room=-1, attempt=0))


def test_encode_refuses_text_that_utf8_cannot_carry() -> None:
    with pytest.raises(ProtocolError, match="Fail cannot be encoded"):
        encode(Fail(room=1, attempt=0, claim_id=0, reason="\ud800"))


def test_encode_refuses_an_integer_that_msgpack_cannot_carry() -> None:
    with pytest.raises(ProtocolError):
        encode(Bye(room=2**70, attempt=0))


def test_a_grant_that_names_a_slot_twice_is_rejected() -> None:
    with pytest.raises(ProtocolError, match="twice"):
        Grant(room=1, attempt=0, request_id=0, claim_id=0, first_page=0, slots=(3, 3), memory=False, lease_s=1.0)


def test_an_offer_of_no_pages_is_rejected() -> None:
    empty = wire(example(Offer)) | {"first_page": 4, "end_page": 4}
    with pytest.raises(ProtocolError, match="at least one page"):
        decode(msgspec.msgpack.encode(empty))


def test_a_plane_whose_pages_overlap_is_rejected() -> None:
    with pytest.raises(ProtocolError, match="stride"):
        Plane(base=0, stride_bytes=10, page_bytes=11)


def test_a_target_beyond_the_address_space_is_rejected() -> None:
    plane = Plane(base=2**63 - 100, stride_bytes=10, page_bytes=10)
    Target(session="s", planes=(plane,), slots=9)
    with pytest.raises(ProtocolError, match="address space"):
        Target(session="s", planes=(plane,), slots=10)


def test_a_plane_gives_the_address_of_a_slot() -> None:
    assert Plane(base=1000, stride_bytes=64, page_bytes=32).address(3) == 1192


def test_a_readable_hello_of_another_version_is_a_hello() -> None:
    newer = msgspec.structs.replace(example(Hello), version=PROTOCOL_VERSION + 1)
    assert decode(encode(newer)) == newer


def test_an_unreadable_hello_of_another_version_says_where_to_answer() -> None:
    newer = wire(example(Hello)) | {"version": PROTOCOL_VERSION + 1, "plane_bytes": "elsewhere now"}
    with pytest.raises(VersionMismatchError, match="version 2") as caught:
        decode(msgspec.msgpack.encode(newer))
    assert (caught.value.version, caught.value.room) == (PROTOCOL_VERSION + 1, 7)


def test_an_unreadable_hello_of_this_version_is_just_malformed() -> None:
    broken = wire(example(Hello)) | {"plane_bytes": "nowhere"}
    with pytest.raises(ProtocolError) as caught:
        decode(msgspec.msgpack.encode(broken))
    assert not isinstance(caught.value, VersionMismatchError)


def test_a_reason_decodes_into_its_enum_member() -> None:
    decoded = decode(encode(NoOffer(room=1, reason=NoOfferReason.RESERVE)))
    assert isinstance(decoded, NoOffer)
    assert decoded.reason is NoOfferReason.RESERVE


@given(st.text() | st.text(st.characters(categories=["Cs", "Zl", "Cc"])) | st.text("x", min_size=250, max_size=300))
def test_clipped_text_always_fits_a_reason(text: str) -> None:
    clipped = clip(text)
    assert "\n" not in clipped
    fail = Fail(room=1, attempt=0, claim_id=0, reason=clipped)
    assert decode(encode(fail)) == fail


def test_clip_takes_exceptions() -> None:
    assert clip(OSError("disk\nfull")) == "disk full"


def test_directions_cover_every_message_once() -> None:
    to_prefill, to_decode = set(protocol.DecodeToPrefill.__args__), set(protocol.PrefillToDecode.__args__)
    assert not to_prefill & to_decode
    assert to_prefill | to_decode == set(MESSAGE_TYPES)


def test_no_number_in_the_protocol_can_be_nan() -> None:
    assert math.isnan(msgspec.msgpack.decode(msgspec.msgpack.encode(math.nan)))  # it would travel
    with pytest.raises(ProtocolError):
        encode(msgspec.structs.replace(example(Offer), lease_s=math.nan))
