"""Requests to routers and servers, with times taken at the client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.testbed.errors import RequestError

JsonObject = Mapping[str, Any]


@dataclass(frozen=True)
class Generation:
    """One finished request: what came out, and when.

    `ttft_s` runs from sending to the first token, `total_s` to the last; without streaming both are the same.
    """

    output_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    finish_reason: str
    ttft_s: float
    total_s: float
    meta: JsonObject = field(default_factory=dict)


def greedy_payload(input_ids: Sequence[int], max_new_tokens: int, **sampling: Any) -> dict[str, Any]:
    """Body of a /generate request whose output is the same each time and has exactly `max_new_tokens` tokens."""
    parameters = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True, **sampling}
    return {"input_ids": list(input_ids), "sampling_params": parameters}


class Client:
    """Talks to one base URL; may be used by many threads at once. Nothing goes through a proxy."""

    def __init__(self, base_url: str, *, timeout_s: float = 240.0) -> None:
        self.base_url = base_url
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.Client(base_url=base_url, timeout=timeout_s, trust_env=False, limits=limits)

    def close(self) -> None:
        self._http.close()

    def get(self, path: str) -> httpx.Response:
        """GET; any status is returned. Raises RequestError when there is no answer."""
        return self._send("GET", path)

    def post(self, path: str, body: JsonObject | None = None) -> httpx.Response:
        """POST a JSON body; any status is returned. Raises RequestError when there is no answer."""
        return self._send("POST", path, json=body)

    def generate(self, payload: JsonObject, *, stream: bool = False) -> Generation:
        """One /generate request. Raises RequestError for an HTTP error, an aborted request, or no answer in time."""
        start = time.perf_counter()
        if stream:
            return self._generate_streaming(payload, start)
        answer = self.post("/generate", payload)
        elapsed_s = time.perf_counter() - start
        if answer.status_code != 200:
            raise RequestError(f"/generate answered {answer.status_code}: {answer.text[:500]}")
        return _generation(answer.json(), ttft_s=elapsed_s, total_s=elapsed_s)

    def _generate_streaming(self, payload: JsonObject, start: float) -> Generation:
        ttft_s: float | None = None
        last: JsonObject | None = None
        try:
            with self._http.stream("POST", "/generate", json={**payload, "stream": True}) as answer:
                if answer.status_code != 200:
                    text = answer.read().decode(errors="replace")
                    raise RequestError(f"/generate answered {answer.status_code}: {text[:500]}")
                for event in _events(answer.iter_lines()):
                    if ttft_s is None and event.get("output_ids"):
                        ttft_s = time.perf_counter() - start
                    last = event
        except httpx.HTTPError as error:
            raise RequestError(f"/generate at {self.base_url} broke off: {error!r}") from error
        total_s = time.perf_counter() - start
        if last is None:
            raise RequestError("/generate sent no event")
        return _generation(last, ttft_s=total_s if ttft_s is None else ttft_s, total_s=total_s)

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise RequestError(f"{method} {self.base_url}{path} got no answer: {error!r}") from error


def _events(lines: Iterator[str]) -> Iterator[JsonObject]:
    """Objects of a server-sent event stream. Raises RequestError for an error event."""
    for line in lines:
        if line.startswith("data:"):
            text = line.removeprefix("data:").strip()
            if text == "[DONE]":
                return
            event = json.loads(text)
            if "error" in event:
                raise RequestError(f"/generate failed: {event['error']}")
            yield event


def _generation(answer: Any, *, ttft_s: float, total_s: float) -> Generation:
    if isinstance(answer, list) or "output_ids" not in answer:
        raise RequestError(f"/generate answered something else: {str(answer)[:500]}")
    meta: JsonObject = answer["meta_info"]
    reason = meta.get("finish_reason") or {}
    if reason.get("type") == "abort":
        raise RequestError(f"/generate was aborted: {reason.get('message')}")
    return Generation(
        output_ids=tuple(answer["output_ids"]),
        prompt_tokens=int(meta.get("prompt_tokens", 0)),
        cached_tokens=int(meta.get("cached_tokens", 0)),
        finish_reason=str(reason.get("type")),
        ttft_s=ttft_s,
        total_s=total_s,
        meta=meta,
    )
