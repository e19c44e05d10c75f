"""The two ends of a hop, each in a process of its own: a decode engine's as the source, a prefill engine's as target.

Everything of the product between SGLang and the transfer engine is the real thing; storage is a reader that finds every
page in place at once, so that a read is nothing but the hop.
"""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.micro.errors import BenchmarkError
from benchmarks.micro.fabrics import fabric
from benchmarks.micro.pages import PLANES, PagePool
from sglang_dualpath.config import DualPathConfig
from sglang_dualpath.control import ControlClient, ControlServer
from sglang_dualpath.ledger import Reserve
from sglang_dualpath.policy import load_policy
from sglang_dualpath.protocol import Message
from sglang_dualpath.reader.decode import DecodeRead, DecodeReads, Phase
from sglang_dualpath.reader.hop import HopReader
from sglang_dualpath.reader.offers import OfferDesk
from sglang_dualpath.reader.prefetch import Prefetch, ReadLimit
from sglang_dualpath.reader.prefill import PrefillReads
from sglang_dualpath.transfer import Peer

HOST = "127.0.0.1"
WAIT_S = 60.0
KEY = b"a key of a microbenchmark"
_BATCH_PAGES = 128  # SGLang's prefetch thread asks for so many at a time
_LEASE_S = 10.0  # a busy machine shall make a read slow, not make it fall back


@dataclass(frozen=True)
class Shape:
    """Memory of an end and how it is sent: `pages` pages of `page_bytes`, `message_pages` at a time.

    `spare_pages` more back the target's claims.
    """

    pages: int
    page_bytes: int
    message_pages: int
    spare_pages: int

    @property
    def message_bytes(self) -> int:
        return self.message_pages * self.page_bytes

    @property
    def total_bytes(self) -> int:
        return self.pages * self.page_bytes

    def config(self) -> DualPathConfig:
        return DualPathConfig(chunk_bytes=self.message_bytes, lease_s=_LEASE_S, read_deadline_s=WAIT_S)


@dataclass(frozen=True)
class Address:
    """Where the target's memory and sockets are."""

    peer: Peer
    base: int
    control: str
    tcp_port: int


def _prefetch(pool: PagePool, slots: Sequence[int], handle: object) -> Prefetch:
    return Prefetch(
        handle=handle,  # type: ignore[arg-type]
        first_page=0,
        stored_pages=len(slots),
        hashes=[str(page) for page in range(len(slots))],
        host_indices=pool.pages.indices(slots),
        read_pages=lambda first, into: len(into),
        is_cancelled=lambda: False,
    )


def _all_batches(reads: PrefillReads | DecodeReads, prefetch: Prefetch) -> int:
    """Wait for all pages as SGLang's prefetch thread does; how many leading ones there are."""
    landed = 0
    while landed < prefetch.pages:
        count = min(_BATCH_PAGES, prefetch.pages - landed)
        got = reads.wait(prefetch, landed, count)
        landed += got
        if got < count:
            break
    return landed


class Target:
    """A prefill engine that lets its decode engine read all of every prompt."""

    def __init__(self, transport: str) -> None:
        self._fabric: Any = fabric(transport)(HOST)
        self._landed: threading.Thread | None = None
        self._landed_s = 0.0
        self._open = False

    def open(self, shape: Shape) -> Address:
        """Take memory of this shape and serve it."""
        self.close()
        self._shape = shape
        self._pool = PagePool(shape.pages + shape.spare_pages, shape.page_bytes)
        pages = self._pool.pages
        transport = self._fabric.transport
        transport.register(pages.geometry)
        reserve = Reserve(range(shape.pages, shape.pages + shape.spare_pages))
        self._reads = PrefillReads(config=shape.config(), pages=pages, reserve=reserve)
        desk = OfferDesk(
            self._reads,
            policy=load_policy("decode"),
            engine="prefill-benchmark",
            session=transport.session,
            metadata=transport.metadata,
            send=lambda peer, message: self._control.send(peer, message),
        )
        self._control = ControlServer(HOST, KEY, desk.handle, lambda kind: None, handler_gone=desk.gone, tick=desk.tick)
        self._listener = socket.create_server((HOST, 0))
        threading.Thread(target=self._serve_tcp, args=(self._listener, shape), daemon=True).start()
        self._open = True
        port = self._listener.getsockname()[1]
        peer = Peer(transport.session, transport.metadata, pages.geometry)
        return Address(peer, self._pool.address, self._control.endpoint, port)

    def _serve_tcp(self, listener: socket.socket, shape: Shape) -> None:
        connection, _ = listener.accept()
        memory = self._pool.memory
        size = shape.message_bytes
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start in itertools.cycle(range(0, shape.total_bytes, size)):
                left = memory[start : start + size]
                while left:
                    count = connection.recv_into(left)
                    if not count:
                        return
                    left = left[count:]
                connection.sendall(b"\0")

    def begin_read(self, room: int, slots: Sequence[int]) -> None:
        """A request arrives whose pages go into these slots; `landed_s` tells when all of them are there."""
        prefetch = _prefetch(self._pool, slots, room)
        self._reads.arrived(room, room)
        self._reads.opened(prefetch)
        self._landed_s = 0.0
        self._landed = threading.Thread(target=self._await, args=(prefetch,), daemon=True)
        self._landed.start()

    def _await(self, prefetch: Prefetch) -> None:
        landed = _all_batches(self._reads, prefetch)
        if landed == prefetch.pages:
            self._landed_s = time.monotonic()
        self._reads.finish(prefetch)
        self._reads.gone(prefetch.handle)

    def landed_s(self) -> float:
        """`time.monotonic()`, which all processes share, of the last landing.

        Raises BenchmarkError for a read of which pages are missing.
        """
        assert self._landed is not None
        self._landed.join(WAIT_S)
        if not self._landed_s:
            raise BenchmarkError("A read did not land as a whole; the log above says why.")
        return self._landed_s

    def clear(self) -> None:
        self._pool.clear()

    def digest(self, slots: Sequence[int] | None) -> str:
        """Digest of these pages; None: of what moves when memory is sent from its beginning on."""
        return self._pool.digest_bytes(self._shape.total_bytes) if slots is None else self._pool.digest(slots)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._listener.close()
            self._reads.stop()
            self._control.close()
            self._fabric.transport.close()


class Source:
    """A decode engine. Every method named in `hop.PATHS` moves all of its memory once, and returns the seconds."""

    def __init__(self, transport: str) -> None:
        self._fabric: Any = fabric(transport)(HOST)
        self._rooms = itertools.count(1)
        self._read: DecodeRead | None = None
        self._open = False

    def open(self, shape: Shape, target: Address) -> None:
        """Take memory of this shape, full of bytes that differ, and connect to the target's."""
        self.close()
        self._shape, self._target = shape, target
        self._pool = PagePool(shape.pages + shape.spare_pages, shape.page_bytes)
        self._pool.fill(shape.message_bytes)
        self._fabric.transport.register(self._pool.pages.geometry)
        self._fabric.meet(self._pool.address, target.peer, target.base)
        self._tcp = socket.create_connection((HOST, target.tcp_port))
        self._tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reads = DecodeReads(
            config=shape.config(), pages=self._pool.pages, engine="decode-benchmark", rank=0, send=self._send
        )
        self._control = ControlClient(
            "decode-benchmark", KEY, self._reads.handle, lambda kind: None, tick=self._reads.tick
        )
        self._hop = HopReader(self._reads, self._fabric.transport, count=1, limit=ReadLimit(0))
        self._open = True

    def _send(self, endpoint: str, message: Message) -> bool:
        return self._control.send(endpoint, message)

    def bare(self) -> float:
        """The transfer engine's own write, one contiguous message after the other."""
        size = self._shape.message_bytes
        start_s = time.monotonic()
        for offset in range(0, self._shape.total_bytes, size):
            self._fabric.write([offset], size)
        return time.monotonic() - start_s

    def pieces(self) -> float:
        """The same with each message in as many pieces, far apart, as a page of this model has."""
        size, apart = self._shape.message_bytes // PLANES, self._shape.total_bytes // PLANES
        start_s = time.monotonic()
        for offset in range(0, apart, size):
            self._fabric.write([offset + plane * apart for plane in range(PLANES)], size)
        return time.monotonic() - start_s

    def push(self, ours: Sequence[int], theirs: Sequence[int]) -> float:
        """Plan and push one message of pages after the other, as the decode engine's pushers do."""
        count, transport, peer = self._shape.message_pages, self._fabric.transport, self._target.peer
        start_s = time.monotonic()
        for first in range(0, self._shape.pages, count):
            transport.push(peer, ours[first : first + count], theirs[first : first + count])
        return time.monotonic() - start_s

    def tcp(self) -> float:
        """A plain TCP connection, each message acknowledged before the next."""
        memory, size = self._pool.memory, self._shape.message_bytes
        start_s = time.monotonic()
        for start in range(0, self._shape.total_bytes, size):
            self._tcp.sendall(memory[start : start + size])
            if not self._tcp.recv(1):
                raise BenchmarkError("The TCP connection was closed.")
        return time.monotonic() - start_s

    def begin_read(self, room: int) -> None:
        """Ask for a share of a read, and wait for the offer."""
        reads = self._reads
        self._read = read = reads.accepted(room, room, match_pages=0, held_slots=[], held_hashes=[])
        reads.greet(read, self._target.control)
        deadline_s = time.monotonic() + WAIT_S
        with reads.lock:
            while read.phase is Phase.GREETING and time.monotonic() < deadline_s:
                reads.lock.wait(0.05)
        if read.phase is not Phase.OFFERED:
            raise BenchmarkError(f"No offer came: the read is {read.phase.value}.")

    def read(self, slots: Sequence[int]) -> float:
        """Read, push and report all pages of the offer; `time.monotonic()` of the beginning."""
        read, reads = self._read, self._reads
        assert read is not None
        prefetch = _prefetch(self._pool, slots, read.room)
        start_s = time.monotonic()
        reads.submitted(read)
        reads.opened(read, prefetch)
        _all_batches(reads, prefetch)
        reads.finish(prefetch)
        reads.settled(read)
        if reads.standing(read).over:
            reads.forget(read)
        return start_s

    def digest(self, slots: Sequence[int] | None) -> str:
        """Digest of these pages; None: of what moves when memory is sent from its beginning on."""
        return self._pool.digest_bytes(self._shape.total_bytes) if slots is None else self._pool.digest(slots)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._reads.stop()
            self._hop.stop()
            self._control.close()
            self._tcp.close()
            self._fabric.transport.close()


def environment(transport: str) -> dict[str, str]:
    """What the ends' processes need in their environment."""
    return {**fabric(transport).environment, "OMP_NUM_THREADS": "1"}
