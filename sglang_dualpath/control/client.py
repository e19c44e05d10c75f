"""The decode side of the control plane: one DEALER socket per prefill engine that was ever sent to."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import zmq

from sglang_dualpath.control.auth import TO_CLIENT, TO_SERVER
from sglang_dualpath.control.loop import QUEUE_LIMIT, ControlErrorKind, ControlLoop
from sglang_dualpath.protocol import Message, ProtocolError, decode

#: Far above the prefill engines of one cluster; ZMQ's own default would be 1023 sockets.
MAX_ENDPOINTS = 4096
RECONNECT_MS = 100
RECONNECT_MAX_MS = 1000

_ENGINE_ID = re.compile(r"[!-~]{1,128}")


class ControlClient(ControlLoop):
    """Talks to any number of servers under the routing id `engine_id`, which must be unique per process start.

    A connection is opened by the first `send` to an endpoint and kept until `drop` or `close`. ZMQ reconnects by
    itself when a server restarts at the same endpoint; what is sent in between waits in a bounded queue, so a new
    server may be asked about requests that it does not know. Nothing here tells whether a server lives: the caller's
    deadlines do.

    Both `drop` and `close` end connections, and a server takes an engine without a connection for dead, and its writes
    for ended: first let the writes towards that server end.

    All callbacks run on the control thread and must be short: `handler(endpoint, message)` and `tick(now_s)` (about
    every `tick_s`; time.monotonic). `on_error(kind)` gets a ControlErrorKind and may come from any thread that calls
    `send`.
    """

    def __init__(
        self,
        engine_id: str,
        key: bytes | None,
        handler: Callable[[str, Message], None],
        on_error: Callable[[str], None],
        *,
        tick: Callable[[float], None] | None = None,
        tick_s: float = 0.05,
        queue_limit: int = QUEUE_LIMIT,
    ) -> None:
        """Starts the thread; ValueError unless `engine_id` is 1 to 128 printable ASCII characters without blanks."""
        if not _ENGINE_ID.fullmatch(engine_id):
            raise ValueError(f"{engine_id!r} cannot be an engine id: 1 to 128 printable ASCII characters, no blanks.")
        super().__init__(
            name="dualpath-control-client",
            key=key,
            on_error=on_error,
            tick=tick,
            tick_s=tick_s,
            queue_limit=queue_limit,
        )
        self._engine = engine_id.encode("ascii")
        self._handler = handler
        self._dealers: dict[str, zmq.Socket[bytes]] = {}
        self._endpoints: dict[zmq.Socket[bytes], str] = {}
        self._start()

    def send(self, endpoint: str, message: Message) -> bool:
        """Queues `message` for the server at `endpoint` (`tcp://host:port`); from any thread, never waits.

        False (counted) if it is invalid, the queue is full or this is closed. True promises nothing: the server may be
        gone, or so long unreachable or so slow that its queue is full (counted then).
        """
        payload = self._encode(message)
        return payload is not None and self._post(functools.partial(self._transmit, endpoint, payload))

    def drop(self, endpoint: str) -> None:
        """Closes the connection to `endpoint`, if any, after what was sent before; a later send opens a new one."""
        self._post(functools.partial(self._disconnect, endpoint), even_if_full=True)

    def _open(self) -> None:
        self._context.set(zmq.MAX_SOCKETS, MAX_ENDPOINTS)

    def _connect(self, endpoint: str) -> zmq.Socket[bytes]:
        # IPv6 only for literal addresses: for a name it could prefer an address that the server does not listen on.
        dealer = self._new_socket(zmq.DEALER, ipv6="[" in endpoint)
        try:
            dealer.set(zmq.ROUTING_ID, self._engine)
            dealer.set(zmq.RECONNECT_IVL, RECONNECT_MS)
            dealer.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
            dealer.connect(endpoint)
        except BaseException:
            dealer.close()
            raise
        self._dealers[endpoint] = dealer
        self._endpoints[dealer] = endpoint
        self._poller.register(dealer, zmq.POLLIN)
        return dealer

    def _disconnect(self, endpoint: str) -> None:
        dealer = self._dealers.pop(endpoint, None)
        if dealer is not None:
            del self._endpoints[dealer]
            self._poller.unregister(dealer)
            dealer.close()

    def _transmit(self, endpoint: str, payload: bytes) -> None:
        dealer = self._dealers.get(endpoint)
        if dealer is None:
            try:
                dealer = self._connect(endpoint)
            except zmq.ZMQError as fault:
                self._count(ControlErrorKind.ENDPOINT, f"cannot connect to {endpoint!r}: {fault}")
                return
        mac = self._auth.sign(payload, direction=TO_SERVER, engine=self._engine)
        try:
            dealer.send_multipart([payload, mac], zmq.NOBLOCK)
        except zmq.Again:
            self._count(ControlErrorKind.PEER_FULL, f"message to {endpoint} dropped")

    def _receive(self, dealer: zmq.Socket[bytes]) -> None:
        endpoint = self._endpoints[dealer]
        frames = dealer.recv_multipart(zmq.NOBLOCK)
        if frames == [b""]:  # the server's probe: being connected is the answer
            return
        if len(frames) != 2:
            self._count(ControlErrorKind.MALFORMED, f"{len(frames)} frames from {endpoint}")
            return
        payload, mac = frames
        if not self._auth.accepts(payload, mac, direction=TO_CLIENT, engine=self._engine):
            self._count(ControlErrorKind.AUTHENTICATION, f"message from {endpoint}")
            return
        try:
            message = decode(payload)
        except ProtocolError as fault:
            self._count(ControlErrorKind.MALFORMED, f"{fault} (from {endpoint})")
            return
        self._guarded(functools.partial(self._handler, endpoint, message))
