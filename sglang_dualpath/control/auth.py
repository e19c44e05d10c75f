"""Who may talk on the control sockets: HMAC-SHA256 over every message, when a key is configured.

A control message travels as two frames, the payload and its MAC; without a key the second one is empty. The MAC covers
the direction and the engine id of the client as well, so that nobody without the key can speak under an engine's id,
hand one engine's messages to another, or send a message back to where it came from.

What this does not do: it neither encrypts nor numbers messages. Whoever can record an engine's traffic *and* connect
under that engine's id can play its messages again; they are validated against open claims like any other. Networks
where that matters need to be closed by other means.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from sglang_dualpath.config import MIN_KEY_BYTES

#: Directions, part of what is signed.
TO_SERVER: Final = b"to-server"
TO_CLIENT: Final = b"to-client"


class Authenticator:
    """Signs and checks payloads with `key`; with None it accepts exactly the messages of peers that have no key either.

    A peer that signs while we hold no key is refused too: half-configured deployments must show, not half-work.
    """

    def __init__(self, key: bytes | None) -> None:
        if key is not None and len(key) < MIN_KEY_BYTES:
            raise ValueError(f"The control key has {len(key)} bytes; at least {MIN_KEY_BYTES} are needed.")
        self._base = None if key is None else hmac.new(key, digestmod=hashlib.sha256)

    def __repr__(self) -> str:
        return f"Authenticator(key={'None' if self._base is None else '***'})"

    def sign(self, payload: bytes, *, direction: bytes, engine: bytes) -> bytes:
        """The MAC frame for `payload` on the connection of client `engine`; empty without a key."""
        if self._base is None:
            return b""
        mac = self._base.copy()
        # Lengths first: without them, two different (direction, engine, payload) could be the same bytes.
        mac.update(b"%d:%d:" % (len(direction), len(engine)))
        mac.update(direction)
        mac.update(engine)
        mac.update(payload)
        return mac.digest()

    def accepts(self, payload: bytes, mac: bytes, *, direction: bytes, engine: bytes) -> bool:
        """Whether `mac` is the one that `sign` returns for the same arguments (compared in constant time)."""
        return hmac.compare_digest(self.sign(payload, direction=direction, engine=engine), mac)
