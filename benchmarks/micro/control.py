"""Round trips over the control sockets: a claim from one process, its grant from another."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from benchmarks.micro.report import Report
from benchmarks.micro.workers import Worker
from sglang_dualpath.control import ControlClient, ControlServer, Peer
from sglang_dualpath.protocol import Claim, Grant, Message

KEYS: dict[str, bytes | None] = {"without key": None, "with key": b"a key of a microbenchmark"}
_ANSWER_S = 10.0


@dataclass(frozen=True)
class ControlSettings:
    """`grant_pages` slots are named by each answer."""

    round_trips: int = 2000
    warm_up: int = 200
    grant_pages: int = 4
    rounds: int = 4


class Server:
    """A prefill engine's end: answers each claim with a grant."""

    def __init__(self, key: bytes | None, grant_pages: int) -> None:
        self._slots = tuple(range(grant_pages))
        self._server = ControlServer("127.0.0.1", key, self._answer, lambda kind: None)

    def _answer(self, peer: Peer, message: Message) -> None:
        assert isinstance(message, Claim)
        self._server.send(
            peer,
            Grant(message.room, message.attempt, message.request_id, message.request_id, 0, self._slots, False, 1.0),
        )

    def endpoint(self) -> str:
        return self._server.endpoint

    def close(self) -> None:
        self._server.close()


class Client:
    """A decode engine's end. Like it, it sends its next claim on the control thread, when an answer has come."""

    def __init__(self, key: bytes | None, endpoint: str) -> None:
        self._endpoint = endpoint
        self._sent_s = 0.0
        self._left = 0
        self._seconds: list[float] = []
        self._done = threading.Event()
        self._client = ControlClient("decode-benchmark", key, self._received, lambda kind: None)

    def measure(self, round_trips: int) -> list[float]:
        """Seconds from handing over a claim to being handed its grant, one round trip after the other."""
        self._seconds, self._left = [], round_trips
        self._done.clear()
        self._claim()
        if not self._done.wait(_ANSWER_S + round_trips * 0.05):
            raise TimeoutError(f"{self._left} of {round_trips} claims have no answer")
        return self._seconds

    def _claim(self) -> None:
        self._sent_s = time.perf_counter()
        self._client.send(self._endpoint, Claim(room=1, attempt=0, request_id=self._left, max_pages=4))

    def _received(self, endpoint: str, message: Message) -> None:
        assert isinstance(message, Grant)
        self._seconds.append(time.perf_counter() - self._sent_s)
        self._left -= 1
        if self._left:
            self._claim()
        else:
            self._done.set()

    def close(self) -> None:
        self._client.close()


def run(settings: ControlSettings) -> Report:
    """Microseconds of a round trip between two processes on loopback, with and without a key, alternating."""
    report = Report("control", vars(settings))
    samples: dict[str, list[float]] = {name: [] for name in KEYS}
    servers = {name: Worker("control-server", Server, key, settings.grant_pages) for name, key in KEYS.items()}
    clients: dict[str, Worker] = {}
    try:
        for name, key in KEYS.items():
            clients[name] = Worker("control-client", Client, key, servers[name].call("endpoint"))
            clients[name].call("measure", settings.warm_up)
        for _ in range(settings.rounds):
            for name, client in clients.items():
                seconds = client.call("measure", settings.round_trips // settings.rounds)
                samples[name] += [second * 1e6 for second in seconds]
    finally:
        for worker in (*clients.values(), *servers.values()):
            worker.close()
    for name, microseconds in samples.items():
        report.add("round trip", "us", microseconds, key=name)
    return report
