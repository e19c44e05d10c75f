"""The routers of SGLang that send one request to a prefill and a decode server."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

from benchmarks.testbed.servers import Place

RouterKind = Literal["gateway", "mini_lb"]


def router_command(
    kind: RouterKind, *, host: str, port: int, metrics_port: int, prefill: Sequence[Place], decode: Sequence[Place]
) -> list[str]:
    """Command line of the Rust gateway, or of mini_lb, the Python load balancer that chooses at random."""
    command = [
        sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation",
        "--host", host, "--port", str(port), "--request-timeout-secs", "600",
    ]  # fmt: skip
    for place in prefill:
        command += ["--prefill", place.url, str(place.bootstrap_port)]
    for place in decode:
        command += ["--decode", place.url]
    if kind == "mini_lb":
        return [*command, "--mini-lb", "--policy", "random"]
    return [
        *command,
        "--policy", "round_robin",
        "--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port),
        "--worker-startup-timeout-secs", "120", "--worker-startup-check-interval", "1",
        "--disable-retries", "--disable-circuit-breaker",  # a failed request shall be seen, not repeated
    ]  # fmt: skip
