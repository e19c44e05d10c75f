"""The prefill side of the control plane: one ROUTER socket that decode engines connect to."""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Callable
from typing import Final

import zmq

from sglang_dualpath.control.auth import TO_CLIENT, TO_SERVER
from sglang_dualpath.control.loop import QUEUE_LIMIT, ControlErrorKind, ControlLoop, Peer
from sglang_dualpath.errors import ControlError
from sglang_dualpath.protocol import (
    Message,
    NoOffer,
    NoOfferReason,
    ProtocolError,
    VersionMismatchError,
    decode,
    encode,
)

#: A message of no bytes asks "are you connected?"; clients ignore it. It needs no MAC because it says nothing.
PROBE: Final = b""


class ControlServer(ControlLoop):
    """Receives from every client that connects, and answers on the connection that a client opened.

    Certain death of a writer
        Pages that a decode engine may still write into are kept out of use until it says its last word or is certainly
        dead. That certainty rests on this socket: there are no heartbeats, so a process that is stopped, paged out or
        busy keeps its TCP connection, however long it is silent, while the kernel closes the connection of a process
        that has ended. From then on ROUTER_MANDATORY lets a send fail with EHOSTUNREACH. A living client reconnects
        within some 100 ms, so a peer is only declared gone, by `handler_gone(peer)`, after it has been unreachable for
        `gone_grace_s` without a break; which also leaves the dying process's writes that its network card had queued
        time to end. A peer that died is found out only by sending to it, so who waits for a last word keeps asking for
        it.

        The limits of this: a process that lives on while its control connection is cut for longer than the grace (the
        kernel gives up after minutes of retransmission, or a middlebox resets connections) counts as dead. And a
        machine that loses power sends nothing, so its engines count as living until the kernel gives up: too late is
        safe.

    All callbacks run on the control thread and must be short: `handler(peer, message)`, `handler_gone(peer)` and
    `tick(now_s)` (about every `tick_s`; time.monotonic). `on_error(kind)` gets a ControlErrorKind and may come from any
    thread that calls `send`.
    """

    def __init__(
        self,
        bind_host: str,
        key: bytes | None,
        handler: Callable[[Peer, Message], None],
        on_error: Callable[[str], None],
        *,
        handler_gone: Callable[[Peer], None] | None = None,
        tick: Callable[[float], None] | None = None,
        tick_s: float = 0.05,
        gone_grace_s: float = 1.0,
        port: int | None = None,
        queue_limit: int = QUEUE_LIMIT,
    ) -> None:
        """Binds `bind_host` (a name, IPv4 or IPv6 address, or "*") at `port` (None: any) and starts the thread.

        Raises ControlError if that address cannot be bound.
        """
        super().__init__(
            name="dualpath-control-server",
            key=key,
            on_error=on_error,
            tick=tick,
            tick_s=tick_s,
            queue_limit=queue_limit,
        )
        self._handler = handler
        self._handler_gone = handler_gone
        self._gone_grace_s = gone_grace_s
        self._bind_host = bind_host
        self._bind_port = port
        self._unreachable_since_s: dict[Peer, float] = {}
        self._endpoint = ""
        self._start()

    @property
    def endpoint(self) -> str:
        """`tcp://host:port` as bound, IPv6 in brackets. A wildcard host stays one: publish a real address then."""
        return self._endpoint

    def send(self, peer: Peer, message: Message) -> bool:
        """Queues `message` for `peer`; from any thread, never waits.

        False if it is invalid, the queue is full (both counted) or this is closed. True promises nothing: the peer may
        be gone, or slow enough to lose it (counted then).
        """
        payload = self._encode(message)
        return payload is not None and self._post(functools.partial(self._transmit, peer, payload))

    def _open(self) -> None:
        host, ipv6 = _address(self._bind_host)
        router = self._new_socket(zmq.ROUTER, ipv6=ipv6)
        router.set(zmq.ROUTER_MANDATORY, 1)
        # A client that reconnects takes its id over. Without this, the new connection of an engine would be ignored
        # for as long as the kernel believes in its old one.
        router.set(zmq.ROUTER_HANDOVER, 1)
        try:
            router.bind(f"tcp://{host}:{self._bind_port or '*'}")
        except zmq.ZMQError as fault:
            raise ControlError(f"The control socket cannot be bound to {self._bind_host}: {fault}.") from fault
        self._endpoint = router.get_string(zmq.LAST_ENDPOINT)
        self._router = router
        self._poller.register(router, zmq.POLLIN)

    def _receive(self, router: zmq.Socket[bytes]) -> None:
        frames = router.recv_multipart(zmq.NOBLOCK)
        if len(frames) != 3:
            self._count(ControlErrorKind.MALFORMED, f"{len(frames)} frames from {frames[0]!r}")
            return
        peer, payload, mac = frames
        if not self._auth.accepts(payload, mac, direction=TO_SERVER, engine=peer):
            self._count(ControlErrorKind.AUTHENTICATION, f"message from {peer!r}")
            return
        try:
            message = decode(payload)
        except VersionMismatchError as fault:
            self._count(ControlErrorKind.VERSION, f"{fault} (from {peer!r})")
            self._transmit(peer, encode(NoOffer(room=fault.room, reason=NoOfferReason.VERSION)))
            return
        except ProtocolError as fault:
            self._count(ControlErrorKind.MALFORMED, f"{fault} (from {peer!r})")
            return
        self._guarded(functools.partial(self._handler, peer, message))

    def _transmit(self, peer: Peer, payload: bytes) -> None:
        """On the control thread. Both faults are raised at the first frame, so that nothing is ever half sent."""
        frames = [peer, payload]
        if payload:
            frames.append(self._auth.sign(payload, direction=TO_CLIENT, engine=peer))
        try:
            self._router.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:  # connected, but its queue is full
            if payload:
                self._count(ControlErrorKind.PEER_FULL, f"message to {peer!r} dropped")
        except zmq.ZMQError as fault:
            if fault.errno != zmq.EHOSTUNREACH:
                raise
            if payload:
                self._count(ControlErrorKind.UNREACHABLE, f"message to {peer!r} dropped")
            self._unreachable_since_s.setdefault(peer, time.monotonic())
            return
        self._unreachable_since_s.pop(peer, None)

    def _maintain(self, now_s: float) -> None:
        for peer in list(self._unreachable_since_s):
            self._transmit(peer, PROBE)
            since_s = self._unreachable_since_s.get(peer)
            if since_s is not None and now_s - since_s >= self._gone_grace_s:
                del self._unreachable_since_s[peer]
                if self._handler_gone is not None:
                    self._guarded(functools.partial(self._handler_gone, peer))


def _address(host: str) -> tuple[str, bool]:
    """`host` as an address, since ZMQ binds no names, and whether that is IPv6; ControlError for an unknown name."""
    if host == "*":
        return host, False
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0]
    except OSError as fault:
        raise ControlError(f"The control socket's host {host!r} has no address: {fault}.") from fault
    return (f"[{address[0]}]", True) if family == socket.AF_INET6 else (str(address[0]), False)
