"""Control endpoints of prefill engines, published on routes of their own next to SGLang's bootstrap registry.

SGLang's ``/route`` reply is parsed strictly by stock decode servers, so nothing is added to it.
"""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web

from sglang_dualpath import metrics

logger = logging.getLogger(__name__)

_ROUTE = "/dualpath/engines"
_TIMEOUT_S = 2.0
# A try comes late by a tenth of the time passed, or by _MOST_RETRY_S; after _OUTAGE_S somebody should know.
_RETRY_S = 1.0
_RETRY_GROWTH = 1.1
_MOST_RETRY_S = 10.0
_OUTAGE_S = 60.0
# A prefill server that answered without the route may be restarted with the flag; ask again after this.
_NEGATIVE_S = 30.0
# One that did not answer, or has not registered yet, may only be starting.
_UNREADY_S = 1.0
_MAX_ENGINES = 4096
_MAX_RANK = 65_535
# Requests name their bootstrap server, so a client could name any number of them.
_MAX_SERVERS = 1024
_MAX_REPLY_BYTES = 1024 * 1024

Then = Callable[[str | None], None]


class EngineDirectory:
    """The bootstrap server's table: dp rank and tp rank to endpoint. Lives on its event loop alone."""

    def __init__(self) -> None:
        self.endpoints: dict[str, str] = {}

    async def put(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
            ranks = int(body["dp_rank"]), int(body["tp_rank"])
            endpoint = body["endpoint"]
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            return web.Response(status=400, text=f"not an engine: {error}")
        key = "{}.{}".format(*ranks)
        full = len(self.endpoints) >= _MAX_ENGINES and key not in self.endpoints
        if not _is_endpoint(endpoint) or not all(0 <= rank <= _MAX_RANK for rank in ranks) or full:
            return web.Response(status=400, text="not a control endpoint")
        self.endpoints[key] = endpoint
        return web.Response(text="OK")

    async def get(self, request: web.Request) -> web.Response:
        return web.json_response(self.endpoints)


def _is_endpoint(value: object) -> bool:
    return isinstance(value, str) and value.startswith("tcp://") and len(value) <= 256


def add_routes(router: web.UrlDispatcher) -> EngineDirectory:
    """Serve a new directory on SGLang's bootstrap server."""
    directory = EngineDirectory()
    router.add_put(_ROUTE, directory.put)
    router.add_get(_ROUTE, directory.get)
    return directory


def publish(bootstrap_url: str, *, dp_rank: int, tp_rank: int, endpoint: str) -> threading.Thread:
    """Register a prefill engine from a thread of its own, again and again until that succeeds or the process ends.

    Without another end: decode servers never help an engine that is not registered, and nobody else would try again.
    """

    def run() -> None:
        body = json.dumps({"dp_rank": dp_rank, "tp_rank": tp_rank, "endpoint": endpoint}).encode()
        began_s = time.monotonic()
        pause_s = _RETRY_S
        is_outage = False
        while True:
            request = urllib.request.Request(
                bootstrap_url + _ROUTE, data=body, method="PUT", headers={"Content-Type": "application/json"}
            )
            try:
                with _OPENER.open(request, timeout=_TIMEOUT_S):
                    break
            except Exception as error:
                _close(error)
                if not is_outage and time.monotonic() - began_s >= _OUTAGE_S:
                    is_outage = True
                    metrics.FALLBACKS.add(reason="not_published")
                    logger.error(
                        "The control endpoint could not be published at %s for %d s; until it is, decode servers "
                        "cannot help: %s", bootstrap_url, _OUTAGE_S, error,
                    )  # fmt: skip
            time.sleep(pause_s)
            pause_s = min(_MOST_RETRY_S, _RETRY_GROWTH * pause_s)
        if is_outage:
            logger.warning("The control endpoint is published at %s now.", bootstrap_url)

    thread = threading.Thread(target=run, name="dualpath-publish", daemon=True)
    thread.start()
    return thread


class EndpointLookup:
    """Finds the control endpoint of a prefill engine, off the caller's thread, and remembers it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="dualpath-lookup")
        self._lock = threading.Lock()
        self._found: dict[str, dict[str, str]] = {}
        self._absent_until: dict[str, float] = {}
        self._waiting: dict[str, list[tuple[str, Then]]] = {}
        """Who waits for the answer to a question that is being asked, by bootstrap server."""
        self._closed = False

    def find(self, bootstrap_addr: str, *, dp_rank: int, tp_rank: int, then: Then) -> None:
        """Call ``then`` with the endpoint, or None if there is none: at once if known, else from a thread."""
        key = f"{dp_rank}.{tp_rank}"
        with self._lock:
            known = self._found.get(bootstrap_addr, {}).get(key)
            absent = self._absent_until.get(bootstrap_addr, 0.0) > self._clock()
            if known is None and not absent and not self._closed:
                waiting = self._waiting.setdefault(bootstrap_addr, [])
                waiting.append((key, then))
                if len(waiting) == 1:
                    self._pool.submit(self._ask, bootstrap_addr)
                return
        then(known)

    def forget(self, endpoint: str) -> None:
        """Nobody answers there any more: look it up again next time."""
        with self._lock:
            for addr, engines in list(self._found.items()):
                if endpoint in engines.values():
                    del self._found[addr]

    def _ask(self, bootstrap_addr: str) -> None:
        engines: dict[str, str] = {}
        absent_s = _UNREADY_S
        try:
            with _OPENER.open(f"http://{bootstrap_addr}{_ROUTE}", timeout=_TIMEOUT_S) as reply:
                body: Any = json.loads(reply.read(_MAX_REPLY_BYTES))
            if isinstance(body, dict):
                engines = {name: endpoint for name, endpoint in body.items() if _is_endpoint(endpoint)}
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                absent_s = _NEGATIVE_S
            _close(error)
            logger.info("No DualPath control endpoint at %s: %s", bootstrap_addr, error)
        except Exception:
            logger.exception("%s could not be asked for control endpoints.", bootstrap_addr)
        finally:
            # Whatever happened: while somebody waits, the question is not asked again.
            self._answer(bootstrap_addr, engines, absent_s)

    def _answer(self, bootstrap_addr: str, engines: dict[str, str], absent_s: float) -> None:
        with self._lock:
            waiting = self._waiting.pop(bootstrap_addr, [])
            if engines:
                _remember(self._found, bootstrap_addr, engines)
            if any(key not in engines for key, _ in waiting):
                _remember(self._absent_until, bootstrap_addr, self._clock() + absent_s)
        for key, then in waiting:
            try:
                then(engines.get(key))
            except Exception:
                logger.exception("A looked-up control endpoint could not be used.")

    def close(self) -> None:
        """Ends the threads. Whoever still waits gets no answer; later questions are answered with None."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)


def _remember(known: dict[str, Any], addr: str, value: object) -> None:
    known.pop(addr, None)
    while len(known) >= _MAX_SERVERS:
        del known[next(iter(known))]
    known[addr] = value


def _close(error: Exception) -> None:
    """An HTTPError holds the connection of its reply."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()


class _PromptSocket(socket.socket):
    """Its timeout is that of all that it receives, not of each piece: a few bytes now and then are no answer."""

    until_s = 0.0

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        left_s = self.until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the answer took too long")
        self.settimeout(left_s)
        return super().recv_into(*args, **kwargs)


class _PromptConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        self.sock = _PromptSocket(fileno=self.sock.detach())
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.until_s = time.monotonic() + _TIMEOUT_S


class _PromptHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_PromptConnection, request)


def _opener() -> urllib.request.OpenerDirector:
    """Opens what it is told, in bounded time, and nothing else.

    Servers of a cluster talk to each other directly, whatever proxy the environment names for the outside, and
    wherever an answer sends them.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (_PromptHandler(), urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler()):
        opener.add_handler(handler)
    return opener


_OPENER = _opener()
