"""Sends the requests of agents through a router and takes the times, with little CPU of its own.

Bodies are made before anything is measured, and of what streams back only a few numbers are decoded.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from benchmarks.load.measures import Record
from benchmarks.load.workload import Workload

REQUEST_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Request:
    """One request, ready to send: `body` is the JSON for /generate."""

    agent: int
    round: int
    prompt_tokens: int
    generated_tokens: int
    body: bytes


class _Details(msgspec.Struct):
    device: int | None = None
    host: int | None = None
    storage: int | None = None


class _FinishReason(msgspec.Struct):
    type: str = ""
    message: str | None = None


class _Meta(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cached_tokens_details: _Details | None = None
    finish_reason: _FinishReason | None = None


class _Event(msgspec.Struct):
    meta_info: _Meta | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)
_encoder = msgspec.json.Encoder()


def make_request(agent: int, round_: int, ids: Sequence[int], generated_tokens: int) -> Request:
    """A greedy request that generates exactly `generated_tokens`, whatever the model would like."""
    sampling = {"temperature": 0.0, "max_new_tokens": generated_tokens, "ignore_eos": True}
    body = _encoder.encode({"input_ids": list(ids), "sampling_params": sampling, "stream": True})
    return Request(agent, round_, len(ids), generated_tokens, body)


def requests_of(workload: Workload, repetition: str) -> list[list[Request]]:
    """All requests of a repetition, by agent."""
    return [
        [
            make_request(agent, index, workload.prompt_ids(agent, index, repetition), round_.generated_tokens)
            for index, round_ in enumerate(trajectory.rounds)
        ]
        for agent, trajectory in enumerate(workload.trajectories)
    ]


def fill_requests_of(workload: Workload) -> list[Request]:
    """One request per agent that has anything to store; the round is -1."""
    fills = [(agent, workload.fill_ids(agent)) for agent in range(len(workload.trajectories))]
    return [make_request(agent, -1, ids, 1) for agent, ids in fills if ids]


def play_offline(
    url: str, agents: Sequence[Sequence[Request]], *, in_flight: int, on_record: Callable[[Record], None] | None = None
) -> list[Record]:
    """All agents at once, at most `in_flight` requests at a time; an agent's next round waits behind the other agents.

    An agent whose request failed plays no further round. Records are in the order in which requests ended.
    """

    async def play(sender: _Sender) -> None:
        ready: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        left = sum(1 for requests in agents if requests)
        for agent, requests in enumerate(agents):
            if requests:
                ready.put_nowait((agent, 0))

        async def work() -> None:
            nonlocal left
            while left:
                agent, index = await ready.get()
                if agent < 0:
                    return
                record = await sender.send(agents[agent][index])
                if record.error is None and index + 1 < len(agents[agent]):
                    ready.put_nowait((agent, index + 1))
                    continue
                left -= 1
                if not left:
                    for _ in range(in_flight):
                        ready.put_nowait((-1, 0))

        await asyncio.gather(*(work() for _ in range(max(1, in_flight))))

    return _replay(url, play, on_record)


def play_poisson(
    url: str,
    agents: Sequence[Sequence[Request]],
    *,
    agents_per_s: float,
    seed: int,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Agents arrive as a Poisson process and play their rounds one after the other, however many are there already."""
    arrivals_s = poisson_arrivals(len(agents), agents_per_s, seed=seed)

    async def play(sender: _Sender) -> None:
        async def agent_from(arrival_s: float, requests: Sequence[Request]) -> None:
            await asyncio.sleep(max(0.0, arrival_s - sender.now_s()))
            for request in requests:
                if (await sender.send(request)).error is not None:
                    return

        await asyncio.gather(*(agent_from(*pair) for pair in zip(arrivals_s, agents, strict=True)))

    return _replay(url, play, on_record)


def poisson_arrivals(count: int, per_s: float, *, seed: int) -> list[float]:
    """Times of `count` arrivals in seconds; the same seed at another rate gives the same pattern, stretched."""
    if per_s <= 0:
        raise ValueError("a Poisson process needs a rate above 0")
    source = random.Random(f"arrivals/{seed}")
    times, now_s = [], 0.0
    for _ in range(count):
        now_s += source.expovariate(1.0) / per_s
        times.append(now_s)
    return times


def _replay(url: str, play: Callable[[_Sender], object], on_record: Callable[[Record], None] | None) -> list[Record]:
    async def run() -> list[Record]:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            timeout=timeout, connector=connector, trust_env=False, read_bufsize=1 << 20
        ) as http:
            sender = _Sender(http, url, on_record)
            await play(sender)  # type: ignore[misc]
            return sender.records

    return asyncio.run(run())


class _Sender:
    """Sends requests of one replay and keeps their records."""

    def __init__(self, http: aiohttp.ClientSession, url: str, on_record: Callable[[Record], None] | None) -> None:
        self.records: list[Record] = []
        self._http = http
        self._url = f"{url.rstrip('/')}/generate"
        self._on_record = on_record
        self._start = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._start

    async def send(self, request: Request) -> Record:
        """Never raises for a request that failed: its record says why."""
        record = Record(request.agent, request.round, self.now_s())
        try:
            await self._stream(request, record)
        except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError) as error:
            record.error = f"no usable answer: {error!r}"
        if record.error is None:
            record.error = _miscounted(request, record)
        self.records.append(record)
        if self._on_record is not None:
            self._on_record(record)
        return record

    async def _stream(self, request: Request, record: Record) -> None:
        headers = {"Content-Type": "application/json"}
        async with self._http.post(self._url, data=request.body, headers=headers) as answer:
            if answer.status != 200:
                record.error = f"status {answer.status}: {(await answer.text())[:300]}"
                return
            async for line in answer.content:
                text = line.strip()
                if not text.startswith(b"data:") or text == b"data: [DONE]":
                    continue
                event = _decoder.decode(text[len(b"data:") :])
                if event.error is not None:
                    record.error = f"failed while streaming: {str(event.error)[:300]}"
                    return
                if event.meta_info is not None:
                    _take(record, event.meta_info, self.now_s())


def _take(record: Record, meta: _Meta, now_s: float) -> None:
    """One streamed event: the tokens so far, at this time."""
    tokens = meta.completion_tokens
    if tokens >= 1 and record.first_s is None:
        record.first_s = now_s
    if tokens >= 2 and record.second_s is None:
        record.second_s = now_s
    if tokens > record.output_tokens:
        record.last_s = now_s
        record.output_tokens = tokens
    record.prompt_tokens = meta.prompt_tokens
    record.cached_tokens = meta.cached_tokens
    if (details := meta.cached_tokens_details) is not None:
        record.cached_device_tokens = details.device
        record.cached_host_tokens = details.host
        record.cached_storage_tokens = details.storage
    if meta.finish_reason is not None and meta.finish_reason.type == "abort":
        record.error = f"aborted: {meta.finish_reason.message}"


def _miscounted(request: Request, record: Record) -> str | None:
    if record.prompt_tokens != request.prompt_tokens:
        return f"the server counted {record.prompt_tokens} prompt tokens, {request.prompt_tokens} were sent"
    if record.output_tokens != request.generated_tokens:
        return f"the server generated {record.output_tokens} tokens, {request.generated_tokens} were asked for"
    if not 0 <= record.cached_tokens <= record.prompt_tokens:
        return f"the server counted {record.cached_tokens} cached of {record.prompt_tokens} prompt tokens"
    return None
