"""The thread under `ControlServer` and `ControlClient`: it alone touches their ZMQ sockets.

Other threads hand it work through a bounded queue and a pipe that wakes it, so that nobody ever waits for a socket.
One round runs the queued work, then what the sockets received (a bounded number each, so that a flood starves nobody),
then the tick. Handlers run on this thread and must be short; one that raises is counted, and the
thread goes on.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import enum
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Final, Self

import zmq

from sglang_dualpath.control.auth import Authenticator
from sglang_dualpath.protocol import MAX_MESSAGE_BYTES, Message, ProtocolError, encode

logger = logging.getLogger(__name__)

#: The ZMQ routing id of a client, which is its engine id in ASCII.
Peer = bytes

QUEUE_LIMIT: Final = 4096  # of a Grant's 20 KiB that is 80 MiB, and seconds of work for the thread
HIGH_WATER_MARK: Final = 1024  # messages per connection and direction, in ZMQ's own queues
RECEIVE_BATCH: Final = 128
START_S: Final = 5.0
CLOSE_S: Final = 2.0
SLOW_HANDLER_S: Final = 0.25
LOG_EVERY_S: Final = 5.0


class ControlErrorKind(enum.StrEnum):
    """What `on_error` is called with."""

    AUTHENTICATION = "authentication"  # received with a wrong, missing or unexpected MAC; dropped
    MALFORMED = "malformed"  # received, authentic, but not a message; dropped
    VERSION = "version"  # a Hello of another protocol version; answered with NoOffer
    HANDLER = "handler"  # a handler or tick raised
    SLOW_HANDLER = "slow_handler"  # one of them took longer than SLOW_HANDLER_S
    ENCODE = "encode"  # asked to send what the protocol does not allow; not sent
    QUEUE_FULL = "queue_full"  # the thread does not keep up; not sent
    PEER_FULL = "peer_full"  # a peer reads too slowly or cannot be reached; not sent
    UNREACHABLE = "unreachable"  # a client has no connection (any more); not sent
    ENDPOINT = "endpoint"  # not an address that can be connected to, or too many; not sent
    LOOP = "loop"  # the thread itself met an error; it goes on
    CLOSE = "close"  # the thread had not ended CLOSE_S after close()


class ControlLoop(abc.ABC):
    """One thread, its ZMQ context and its queue. Subclasses own the sockets.

    Context manager; leaving it closes.
    """

    def __init__(
        self,
        *,
        name: str,
        key: bytes | None,
        on_error: Callable[[str], None],
        tick: Callable[[float], None] | None,
        tick_s: float,
        queue_limit: int,
    ) -> None:
        self._auth = Authenticator(key)
        self._on_error = on_error
        self._tick = tick
        self._tick_s = tick_s
        self._queue_limit = queue_limit
        self._lock = threading.Lock()  # guards everything down to the blank line; never held during a call to anyone
        self._queue: collections.deque[Callable[[], None]] = collections.deque()
        self._woken = False
        self._closing = False
        self._errors: collections.Counter[str] = collections.Counter()
        self._last_log_s: dict[str, float] = {}

        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._wake_out, self._wake_in = os.pipe()
        os.set_blocking(self._wake_out, False)
        os.set_blocking(self._wake_in, False)
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # -- for any thread ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends the thread and closes the sockets; what was not sent yet is dropped. Idempotent.

        No handler runs after it returns, unless one has been running for CLOSE_S already (logged and counted). From
        the control thread itself it only asks for the end.
        """
        with self._lock:
            self._closing = True
            self._wake()
        if threading.current_thread() is self._thread:
            return
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._count(ControlErrorKind.CLOSE, "the thread is stuck in a handler")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- for subclasses ------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _open(self) -> None:
        """Opens what must be open before the constructor returns; what it raises, the constructor raises."""

    @abc.abstractmethod
    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        """Takes one message from `socket` and handles it; raises zmq.Again when there is none."""

    def _maintain(self, now_s: float) -> None:
        """Called with every tick."""
        return

    def _start(self) -> None:
        """Starts the thread and waits until `_open` has returned; at most START_S (TimeoutError)."""
        self._thread.start()
        try:
            self._started.result(START_S)
        except BaseException:
            self.close()
            raise

    def _post(self, call: Callable[[], None], *, even_if_full: bool = False) -> bool:
        """Queues `call` for the thread. Never waits: False if closed or full (counted)."""
        with self._lock:
            if self._closing:
                return False
            full = len(self._queue) >= self._queue_limit and not even_if_full
            if not full:
                self._queue.append(call)
                self._wake()
        if full:
            self._count(ControlErrorKind.QUEUE_FULL, f"{self._queue_limit} calls wait already")
        return not full

    def _encode(self, message: Message) -> bytes | None:
        try:
            return encode(message)
        except ProtocolError as fault:
            self._count(ControlErrorKind.ENCODE, str(fault))
            return None

    def _new_socket(self, kind: int, *, ipv6: bool) -> zmq.Socket[bytes]:
        """A socket that never lingers, never queues without bound and refuses oversized frames.

        No ZMQ heartbeats, on purpose: a frozen process must keep its connections (see `ControlServer`).
        """
        socket = self._context.socket(kind)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.set(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.set(zmq.IPV6, int(ipv6))
        return socket

    def _count(self, kind: ControlErrorKind, detail: str, *, trace: bool = False) -> None:
        """Counts, tells `on_error`, and logs at most a line per kind and LOG_EVERY_S (a flood must not fill disks)."""
        now_s = time.monotonic()
        with self._lock:
            self._errors[kind.value] += 1
            count = self._errors[kind.value]
            log = now_s - self._last_log_s.get(kind.value, -LOG_EVERY_S) >= LOG_EVERY_S
            if log:
                self._last_log_s[kind.value] = now_s
        if log:
            logger.warning("%s: %s: %s (%d so far)", self._thread.name, kind.value, detail, count, exc_info=trace)
        try:
            self._on_error(kind.value)
        except Exception:
            logger.exception("%s: on_error raised", self._thread.name)

    def _guarded(self, call: Callable[[], None], kind: ControlErrorKind = ControlErrorKind.HANDLER) -> None:
        """Makes a call that may raise or be slow without harm to the thread."""
        start_s = time.monotonic()
        try:
            call()
        except Exception as fault:
            self._count(kind, f"{type(fault).__name__}: {fault}", trace=True)
        took_s = time.monotonic() - start_s
        if took_s > SLOW_HANDLER_S:
            self._count(ControlErrorKind.SLOW_HANDLER, f"{call!r} took {took_s:.3f} s")

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """With the lock held: makes the thread's poll return. One byte at a time is in the pipe, so it never fills."""
        if not self._woken and self._wake_in >= 0:
            self._woken = True
            os.write(self._wake_in, b"\0")

    def _run(self) -> None:
        try:
            self._open()
            self._poller.register(self._wake_out, zmq.POLLIN)
            self._started.set_result(None)
            self._loop()
        except BaseException as fault:
            if self._started.done():
                raise
            self._started.set_exception(fault)
        finally:
            with self._lock:
                self._closing = True
                os.close(self._wake_out)
                os.close(self._wake_in)
                self._wake_in = -1
            self._context.destroy(linger=0)

    def _loop(self) -> None:
        next_tick_s = time.monotonic()
        while not self._closing:
            try:
                ready = self._poller.poll(_timeout_ms(next_tick_s))
                self._run_queue()
                for socket, _ in ready:
                    if isinstance(socket, zmq.Socket) and not socket.closed:
                        self._receive_batch(socket)
                now_s = time.monotonic()
                if now_s >= next_tick_s and not self._closing:
                    next_tick_s = now_s + self._tick_s
                    self._maintain(now_s)
                    if self._tick is not None:
                        self._guarded(functools.partial(self._tick, now_s))
            except Exception as fault:
                self._count(ControlErrorKind.LOOP, f"{type(fault).__name__}: {fault}", trace=True)
                time.sleep(0.001)  # an error that repeats must not take a core

    def _run_queue(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_out, 64)
        with self._lock:
            self._woken = False
            calls, self._queue = self._queue, collections.deque()
        for call in calls:
            if self._closing:
                return
            self._guarded(call, ControlErrorKind.LOOP)

    def _receive_batch(self, socket: zmq.Socket[bytes]) -> None:
        for _ in range(RECEIVE_BATCH):
            if self._closing or socket.closed:
                return
            try:
                self._receive(socket)
            except zmq.Again:
                return


def _timeout_ms(due_s: float) -> int:
    # Rounded up: a poll that returns just before the tick is due would spin until it is.
    return max(0, int((due_s - time.monotonic()) * 1000) + 1)
