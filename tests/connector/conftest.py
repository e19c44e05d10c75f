"""A bootstrap server's worth of aiohttp, on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest
from aiohttp import web

from tests.connector.bootstrap import Bootstrap

Serve = Callable[[web.Application], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start an application on a free port; gives its address, host and port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runners: list[web.AppRunner] = []

    async def start(app: web.Application) -> str:
        runner = web.AppRunner(app)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        return f"127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]

    async def stop() -> None:
        for runner in runners:
            await runner.cleanup()
        await asyncio.sleep(0.1)  # transports that were closed say so in the loop's next rounds

    def run(app: web.Application) -> str:
        return asyncio.run_coroutine_threadsafe(start(app), loop).result(10)

    yield run
    asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture
def bootstrap() -> Bootstrap:
    return Bootstrap()


@pytest.fixture
def address(serve: Serve, bootstrap: Bootstrap) -> str:
    return serve(bootstrap.app)
