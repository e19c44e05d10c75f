"""A bootstrap server with the routes of control endpoints, and the questions that its clients ask."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from aiohttp import web

from sglang_dualpath.connector.directory import add_routes

ROUTE = "/dualpath/engines"
ENDPOINT = "tcp://10.0.0.1:7000"


class Bootstrap:
    """Counts questions, and may be told what to answer."""

    def __init__(self) -> None:
        self.app = web.Application(middlewares=[self._count])
        self.directory = add_routes(self.app.router)
        self.asked = 0
        self.answer: web.StreamResponse | None = None

    @web.middleware
    async def _count(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.method == "GET":
            self.asked += 1
            if self.answer is not None:
                return self.answer
        response: web.StreamResponse = await handler(request)
        return response


def put(address: str, body: object) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{address}{ROUTE}", data=data, method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def get(address: str) -> dict[str, str]:
    with urllib.request.urlopen(f"http://{address}{ROUTE}", timeout=5) as reply:
        return dict(json.loads(reply.read()))


def engine(endpoint: str = ENDPOINT, dp_rank: int = 0, tp_rank: int = 0) -> dict[str, object]:
    return {"dp_rank": dp_rank, "tp_rank": tp_rank, "endpoint": endpoint}
