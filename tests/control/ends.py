"""A server and clients on loopback, with everything that they report recorded."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from sglang_dualpath.control import ControlClient, ControlServer
from sglang_dualpath.control.loop import ControlLoop
from sglang_dualpath.protocol import Message

KEY = b"0123456789abcdef-key"
WAIT_S = 10.0  # far above what a loaded machine needs; only failures wait that long


def wait_for(condition: Callable[[], object], what: str = "condition") -> None:
    """Returns once `condition()` is true; fails the test after WAIT_S."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline_s:
            pytest.fail(f"{what} did not come true within {WAIT_S} s")
        time.sleep(0.002)


def port_of(server: ControlServer) -> int:
    return int(server.endpoint.rpartition(":")[2])


@dataclass
class Record:
    """What one end reported."""

    messages: list[tuple[Any, Message]] = field(default_factory=list)
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    gone: list[bytes] = field(default_factory=list)

    def handler(self, source: bytes | str, message: Message) -> None:
        self.messages.append((source, message))

    def on_error(self, kind: str) -> None:
        self.errors[kind] += 1


class Ends:
    """Makes servers and clients and closes them at the end of the test."""

    def __init__(self) -> None:
        self.open: list[ControlLoop] = []

    def server(
        self, host: str = "127.0.0.1", *, key: bytes | None = KEY, **options: Any
    ) -> tuple[ControlServer, Record]:
        record = Record()
        handler = options.pop("handler", record.handler)
        options.setdefault("handler_gone", record.gone.append)
        options.setdefault("gone_grace_s", 0.3)
        server = ControlServer(host, key, handler, record.on_error, **options)
        self.open.append(server)
        return server, record

    def client(
        self, engine: str = "decode-1", *, key: bytes | None = KEY, **options: Any
    ) -> tuple[ControlClient, Record]:
        record = Record()
        handler = options.pop("handler", record.handler)
        client = ControlClient(engine, key, handler, record.on_error, **options)
        self.open.append(client)
        return client, record
