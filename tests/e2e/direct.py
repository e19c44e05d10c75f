"""Requests sent to a chosen pair of servers, as a router would, so that a test says which decode server serves."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Sequence
from typing import Any

from benchmarks.testbed.client import greedy_payload
from benchmarks.testbed.cluster import Cluster
from benchmarks.testbed.errors import RequestError


def ask_pair(
    cluster: Cluster, tokens: Sequence[int], *, prefill: str = "prefill", decode: str = "decode", new_tokens: int = 8
) -> tuple[int, ...]:
    """Greedy output of one request served by these two; raises RequestError when the decode server fails it."""
    place = cluster.places[prefill]
    payload = greedy_payload(tokens, new_tokens) | {
        "bootstrap_host": place.compute_address,
        "bootstrap_port": place.bootstrap_port,
        "bootstrap_room": random.getrandbits(62),
    }
    # The prefill server's own answer is not waited for: without its decode server it comes minutes later.
    threading.Thread(target=_post, args=(cluster, prefill, payload), daemon=True).start()
    return cluster.clients[decode].generate(payload).output_ids


def _post(cluster: Cluster, server: str, payload: dict[str, Any]) -> None:
    with contextlib.suppress(RequestError):
        cluster.clients[server].post("/generate", payload)
