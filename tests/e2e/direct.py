"""Requests sent to a chosen pair of servers, as a router would, so that a test says which decode server serves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.testbed.client import greedy_payload
from benchmarks.testbed.cluster import Cluster


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
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cluster.clients[prefill].post, "/generate", payload)
        answer = pool.submit(cluster.clients[decode].generate, payload)
        try:
            return answer.result().output_ids
        finally:
            first.cancel()
