"""The control connections of one test, in process: messages can be slow, lost, doubled, or held in a frozen end."""

from __future__ import annotations

import heapq
import itertools
import random
import threading
import time
from collections.abc import Callable

from sglang_dualpath.protocol import Message, decode, encode

Handler = Callable[[str, Message], None]


class Wire:
    """Delivers messages between named ends on one thread, in order unless ``jitter_s`` is set."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.jitter_s = 0.0
        self.lose: Callable[[str, str, Message], bool] = lambda sender, receiver, message: False
        self.double: Callable[[Message], bool] = lambda message: False
        self.log: list[tuple[str, str, Message]] = []
        self.errors: list[BaseException] = []
        self._ends: dict[str, Handler] = {}
        self._ticks: dict[str, Callable[[], None]] = {}
        self._frozen: set[str] = set()
        self._dead: set[str] = set()
        self._held: list[tuple[str, str, bytes]] = []
        self._queue: list[tuple[float, int, str, str, bytes]] = []
        self._ids = itertools.count()
        self._random = random.Random(1)
        self._lock = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="wire", daemon=True)
        self._thread.start()

    def join(self, name: str, handler: Handler, tick: Callable[[], None]) -> None:
        with self._lock:
            self._ends[name] = handler
            self._ticks[name] = tick

    def send(self, sender: str, receiver: str, message: Message) -> bool:
        payload = encode(message)
        with self._lock:
            self.log.append((sender, receiver, message))
            if sender in self._dead or receiver in self._dead or self.lose(sender, receiver, message):
                return True
            for _ in range(1 + self.double(message)):
                self._push(sender, receiver, payload)
        return True

    def _push(self, sender: str, receiver: str, payload: bytes) -> None:
        due = time.monotonic() + self.delay_s + self.jitter_s * self._random.random()
        heapq.heappush(self._queue, (due, next(self._ids), sender, receiver, payload))
        self._lock.notify_all()

    def freeze(self, name: str) -> None:
        with self._lock:
            self._frozen.add(name)

    def thaw(self, name: str) -> None:
        with self._lock:
            self._frozen.discard(name)
            held, self._held = self._held, []
            for one in held:
                self._push(*one)

    def kill(self, name: str) -> None:
        with self._lock:
            self._dead.add(name)

    def sent(self, kind: type[Message]) -> list[Message]:
        with self._lock:
            return [message for _, _, message in self.log if isinstance(message, kind)]

    def _run(self) -> None:
        next_tick = time.monotonic()
        while True:
            with self._lock:
                if self._stopped:
                    return
                now = time.monotonic()
                if now < next_tick and (not self._queue or self._queue[0][0] > now):
                    due = min(next_tick, self._queue[0][0]) if self._queue else next_tick
                    self._lock.wait(due - now)
                    continue
                item = None
                if self._queue and self._queue[0][0] <= now:
                    _, _, sender, receiver, payload = heapq.heappop(self._queue)
                    if {sender, receiver} & self._dead:
                        continue
                    if {sender, receiver} & self._frozen:
                        self._held.append((sender, receiver, payload))
                        continue
                    item = (self._ends[receiver], sender, payload)
                ticks = []
                if now >= next_tick:
                    next_tick = now + 0.01
                    ticks = [tick for name, tick in self._ticks.items() if name not in self._frozen | self._dead]
            try:
                if item is not None:
                    handler, sender, payload = item
                    handler(sender, decode(payload))
                for tick in ticks:
                    tick()
            except BaseException as fault:
                self.errors.append(fault)

    def close(self) -> None:
        with self._lock:
            self._stopped = True
            self._lock.notify_all()
        self._thread.join(5)
