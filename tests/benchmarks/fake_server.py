"""A router and server in one that speaks SGLang's streaming format and remembers pages, without any model."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

PAGE = 64
KV_BYTES = 16 * 1024


class FakeServer:
    """Answers /generate, /flush_cache, /metrics and /health. Whole pages seen before are hits, from "storage"."""

    def __init__(self) -> None:
        self.url = ""
        self.token_s = 0.001
        self.prompts: list[list[int]] = []
        self.in_flight = self.most_in_flight = self.flushes = self.read_bytes = 0
        self.change: Callable[[dict[str, Any]], dict[str, Any]] = lambda event: event
        self.status = 200
        self._pages: set[bytes] = set()

    def _cached(self, ids: list[int]) -> int:
        known = 0
        while (known + 1) * PAGE < len(ids) and bytes(ids[: (known + 1) * PAGE]) in self._pages:
            known += 1
        self.read_bytes += known * PAGE * KV_BYTES
        for page in range(len(ids) // PAGE):
            self._pages.add(bytes(ids[: (page + 1) * PAGE]))
        return known * PAGE

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        ids, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        assert body["sampling_params"]["ignore_eos"] is True
        self.prompts.append(ids)
        if self.status != 200:
            return web.Response(status=self.status, text="out of pages")
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        cached = self._cached(ids)
        answer = web.StreamResponse()
        await answer.prepare(request)
        for token in range(1, count + 1):
            await asyncio.sleep(self.token_s)
            meta = {"prompt_tokens": len(ids), "completion_tokens": token, "cached_tokens": cached,
                    "cached_tokens_details": {"device": 0, "host": 0, "storage": cached, "storage_backend": "x"},
                    "finish_reason": {"type": "length", "length": count} if token == count else None}  # fmt: skip
            event = self.change({"output_ids": list(range(token)), "text": "", "meta_info": meta})
            await answer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await answer.write(b"data: [DONE]\n\n")
        self.in_flight -= 1
        return answer

    async def _flush(self, _: web.Request) -> web.Response:
        self.flushes += 1
        return web.Response(text="flushed")

    async def _metrics(self, _: web.Request) -> web.Response:
        lines = [f"sglang_dualpath_read_bytes_total {float(self.read_bytes)}",
                 f'sglang_dualpath_fallbacks_total{{reason="lease_expired"}} {float(len(self.prompts))}',
                 'sglang_dualpath_fallbacks_total{reason="no_hello"} 7.0',
                 f"sglang:inter_token_latency_seconds_sum {3.0 + 0.5 * len(self.prompts)}",
                 f"sglang:inter_token_latency_seconds_count {100 + 25 * len(self.prompts)}"]  # fmt: skip
        return web.Response(text="\n".join(lines) + "\n")

    async def _serve(self, ready: threading.Event, ended: asyncio.Event) -> None:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/flush_cache", self._flush)
        app.router.add_get("/health", _healthy)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}"
        ready.set()
        await ended.wait()
        await runner.cleanup()


async def _healthy(_: web.Request) -> web.Response:
    return web.Response()


@contextmanager
def running() -> Iterator[FakeServer]:
    server = FakeServer()
    ready = threading.Event()
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def main() -> None:
        ended = asyncio.Event()
        loops.append((asyncio.get_running_loop(), ended))
        await server._serve(ready, ended)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(10.0)
    try:
        yield server
    finally:
        loop, ended = loops[0]
        loop.call_soon_threadsafe(ended.set)
        thread.join()
