"""Hypothesis strategies for every message type, and values just outside every field, both derived from the types."""

from __future__ import annotations

import math
from typing import Any, get_args

import msgspec
from hypothesis import strategies as st
from msgspec import inspect as types

from sglang_dualpath import protocol
from sglang_dualpath.protocol import Message, Offer, Plane, Target

MESSAGE_TYPES: tuple[type[Message], ...] = get_args(Message)


def values(kind: types.Type) -> st.SearchStrategy[Any]:
    """What a field of type `kind` may hold."""
    match kind:
        case types.IntType(ge=low, le=high):
            return st.integers(low, high)
        case types.FloatType(ge=low, le=high):
            return st.floats(low, high)
        case types.BoolType():
            return st.booleans()
        case types.NoneType():
            return st.none()
        case types.StrType(pattern=str()):
            return st.text(
                "".join(map(chr, range(0x21, 0x7F))), min_size=kind.min_length or 0, max_size=kind.max_length
            )
        case types.StrType():
            return st.text(min_size=kind.min_length or 0, max_size=kind.max_length)
        case types.BytesType():
            return st.binary(min_size=kind.min_length or 0, max_size=min(kind.max_length or 0, 64))
        case types.EnumType(cls=members):
            return st.sampled_from(list(members))
        case types.VarTupleType(item_type=item):
            size = min(kind.max_length or 0, 20)
            return st.lists(values(item), min_size=kind.min_length or 0, max_size=size, unique=True).map(tuple)
        case types.UnionType(types=choices):
            return st.one_of(map(values, choices))
        case types.StructType(cls=struct):
            return structs(struct)
    raise AssertionError(f"no strategy for {kind}")


def structs(struct: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Valid instances of `struct`, rules between its fields included."""
    fields = types.type_info(struct)
    assert isinstance(fields, types.StructType)
    return st.fixed_dictionaries({field.name: values(field.type) for field in fields.fields}).map(
        lambda drawn: struct(**_consistent(struct, drawn))
    )


def _consistent(struct: type[msgspec.Struct], drawn: dict[str, Any]) -> dict[str, Any]:
    if struct is Plane:
        low, high = sorted((drawn["page_bytes"], drawn["stride_bytes"]))
        return drawn | {"page_bytes": low, "stride_bytes": high}
    if struct is Target:
        planes = tuple(msgspec.structs.replace(plane, base=plane.base % 2**48) for plane in drawn["planes"])
        return drawn | {"planes": planes, "slots": drawn["slots"] % 2**22 + 1}
    if struct is Offer:
        low, high = sorted((drawn["first_page"], drawn["end_page"]))
        return drawn | {"first_page": min(low, 2**31 - 1), "end_page": max(high, low + 1) if low < 2**31 else 2**31}
    return drawn


messages = st.one_of(map(structs, MESSAGE_TYPES))


def outside(kind: types.Type) -> list[object]:
    """Values that a field of type `kind` must reject, as msgpack can carry them."""
    match kind:
        case types.IntType(ge=low, le=high):
            assert low is not None
            assert high is not None
            return [low - 1, high + 1, 2**64 - 1, True, 1.5, "1", None, [], {}]
        case types.FloatType(ge=low, le=high):
            assert low is not None
            assert high is not None
            return [low - 1.0, high * 2, math.nan, math.inf, -math.inf, "1", True, []]
        case types.BoolType():
            return [0, 1, "true", None]
        case types.EnumType():
            return ["no such reason", 0, None]
        case types.StrType(max_length=longest):
            assert longest is not None
            wrong: list[object] = ["x" * (longest + 1), b"bytes", 1, None]
            return wrong + (["", "two words", "line\n", "\u00e9"] if kind.pattern else [])
        case types.BytesType(max_length=longest):
            assert longest is not None
            return [b"x" * (longest + 1), "text", 1, [1], None]
        case types.VarTupleType(item_type=item, max_length=longest):
            assert longest is not None
            wrong = [[value] for value in outside(item)]
            return [*wrong, [], list(range(1, longest + 2)), "x", 1, None]
        case types.UnionType(types=choices):
            return [value for choice in choices for value in outside(choice) if value is not None]
        case types.NoneType():
            return []
        case types.StructType(fields=fields):
            return [[], None, 1, {}, *({field.name: value} for field in fields for value in outside(field.type))]
    raise AssertionError(f"no counterexample for {kind}")


def example(struct: type[msgspec.Struct]) -> Any:
    """One plain valid message of each type."""
    plane = protocol.Plane(base=2**46, stride_bytes=8192, page_bytes=4096)
    known: dict[str, object] = {
        "room": 7, "attempt": 1, "version": protocol.PROTOCOL_VERSION, "package": "0.1.0", "rank": 0,
        "engine": "decode-host-1-ff", "page_tokens": 64, "page_bytes": 8192, "plane_bytes": (4096, 4096), "tp_size": 1,
        "match_pages": 8, "held_end_page": 4, "first_page": 2, "end_page": 9, "storage_end_page": 8, "end_hash": "ab",
        "target": protocol.Target(session="host:1", planes=(plane, plane), slots=1000, metadata=b"\x00\xff"),
        "session": "host:1", "lease_s": 1.0,
        "chunk_pages": 4, "limit_pages": None, "request_id": 3, "claim_id": 5, "max_pages": 4, "slots": (4, 5, 9),
        "memory": False, "retry": True, "good_pages": 3, "read_bytes": 1, "pushed_bytes": 2, "kept_pages": 6,
        "reason": protocol.NoOfferReason.NO_HITS if struct is protocol.NoOffer else "because",
    }  # fmt: skip
    return struct(**{name: known[name] for name in struct.__struct_fields__ if name in known})
