"""What the MAC covers."""

from __future__ import annotations

import pytest

from sglang_dualpath.control.auth import TO_CLIENT, TO_SERVER, Authenticator

KEY = b"k" * 16
MAC_BYTES = 32  # of SHA-256


def test_a_signed_payload_is_accepted() -> None:
    mac = Authenticator(KEY).sign(b"payload", direction=TO_SERVER, engine=b"e")
    assert len(mac) == MAC_BYTES
    assert Authenticator(KEY).accepts(b"payload", mac, direction=TO_SERVER, engine=b"e")


@pytest.mark.parametrize(
    ("payload", "direction", "engine"),
    [(b"Payload", TO_SERVER, b"e"), (b"payload", TO_CLIENT, b"e"), (b"payload", TO_SERVER, b"f")],
)
def test_a_mac_holds_for_one_payload_direction_and_engine(payload: bytes, direction: bytes, engine: bytes) -> None:
    auth = Authenticator(KEY)
    mac = auth.sign(b"payload", direction=TO_SERVER, engine=b"e")
    assert not auth.accepts(payload, mac, direction=direction, engine=engine)


def test_the_border_between_engine_and_payload_is_signed() -> None:
    auth = Authenticator(KEY)
    mac = auth.sign(b"bc", direction=TO_SERVER, engine=b"a")
    assert not auth.accepts(b"c", mac, direction=TO_SERVER, engine=b"ab")


@pytest.mark.parametrize("cut", [0, 1, MAC_BYTES - 1])
def test_a_truncated_mac_is_refused(cut: int) -> None:
    auth = Authenticator(KEY)
    mac = auth.sign(b"payload", direction=TO_SERVER, engine=b"e")
    assert not auth.accepts(b"payload", mac[:cut], direction=TO_SERVER, engine=b"e")


def test_without_a_key_only_unsigned_messages_are_accepted() -> None:
    auth = Authenticator(None)
    assert auth.sign(b"payload", direction=TO_SERVER, engine=b"e") == b""
    assert auth.accepts(b"payload", b"", direction=TO_SERVER, engine=b"e")
    assert not auth.accepts(b"payload", b"x" * MAC_BYTES, direction=TO_SERVER, engine=b"e")


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="15 bytes"):
        Authenticator(b"k" * 15)


def test_the_key_does_not_show() -> None:
    assert repr(Authenticator(KEY)) == "Authenticator(key=***)"
    assert repr(Authenticator(None)) == "Authenticator(key=None)"
