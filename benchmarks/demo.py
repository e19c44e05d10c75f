"""Both load paths on this machine, compared with stock SGLang token by token: `python -m benchmarks.demo`.

Starts a store, a prefill and a decode server with `--kv-connector dualpath` and a router, and lets agents play rounds
over growing contexts. Caches are dropped between rounds, so that every round loads what was seen before: from storage,
and in the last round from the decode server's memory. The same rounds then run on the same servers without the flag and
with an empty store of their own. As root, every server is a node with storage and compute links of limited rate, whose
own byte counters are shown; otherwise all runs on loopback. Results are written to out/demo.json.

Exit status: 0 when all that the demo promises held, 1 when something did not, 2 when it could not run.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import report
from benchmarks.rounds import Round, RoundKind, Workload, play
from benchmarks.testbed import (
    Cluster,
    ClusterSpec,
    NetworkSpec,
    ServerSpec,
    StoreSpec,
    TestbedError,
    dualpath_pair,
    identity_model,
    missing_requirement,
    stock_pair,
)
from benchmarks.testbed.store import REPOSITORY

_LEAST_WIDTH = 108  # of the tables; narrower terminals wrap lines, which is easier to read than cut numbers
_SPOKEN: dict[RoundKind, str] = {
    "fresh": "nothing to load yet",
    "storage": "caches of both servers dropped: hits come from storage",
    "decode_memory": "only the prefill server's cache dropped: hits come from the decode server's memory",
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the demo; every default is the documented setting."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=(__doc__ or "").split("\n\n")[0])
    workload = Workload()
    parser.add_argument("--agents", type=int, default=workload.agents, help="agents that send at the same time")
    parser.add_argument("--rounds", type=int, default=workload.rounds, help="rounds, the first and the last included")
    parser.add_argument("--snic-mbit", type=int, default=200, help="rate of each storage link, Mbit/s")
    parser.add_argument("--cnic-mbit", type=int, default=1600, help="rate of each compute link, Mbit/s")
    parser.add_argument("--loopback", action="store_true", help="no namespaces and shaped links, even as root")
    parser.add_argument("--router", choices=["gateway", "mini_lb"], default="gateway")
    parser.add_argument("--store", choices=["mooncake", "file"], default="mooncake")
    parser.add_argument(
        "--stock", choices=["decode-hicache", "prefill-hicache"], default="decode-hicache",
        help="the stock pair: the same flags, or the decode server without host memory and storage",
    )  # fmt: skip
    parser.add_argument("--connector", default="dualpath", help="value of --kv-connector; `none` plays stock twice")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "out", help="directory of results, logs and models")
    return parser.parse_args(arguments)


class Player:
    """Plays the rounds on one system after the other and shows how far it is."""

    def __init__(self, options: argparse.Namespace, workload: Workload, network: NetworkSpec | None) -> None:
        self.console = Console(highlight=False)
        if self.console.width < _LEAST_WIDTH:
            self.console = Console(highlight=False, width=_LEAST_WIDTH)
        self.workload = workload
        self._options = options
        self._network = network
        self._model = identity_model(options.out / "models")

    def run(
        self, system: str, servers: tuple[ServerSpec, ServerSpec], recorded: Sequence[Round] | None = None
    ) -> list[Round]:
        """Bring up a cluster with an empty store, play all rounds on it, take it down."""
        spec = ClusterSpec(
            model=self._model,
            servers=servers,
            store=StoreSpec(kind=self._options.store, capacity_bytes=2 << 30),
            router=self._options.router,
            network=self._network,
        )
        self.console.rule(f"[bold]{system}")
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        total = self.workload.agents * self.workload.rounds
        with Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True) as progress:
            task = progress.add_task("starting store, servers and router", total=total)

            def begin(index: int, kind: RoundKind) -> None:
                progress.update(task, description=f"round {index + 1} of {self.workload.rounds}: {_SPOKEN[kind]}")

            with Cluster(spec, log_dir=self._options.out / "logs" / system, say=self.console.print) as cluster:
                rounds = play(
                    cluster,
                    self.workload,
                    recorded=None if recorded is None else [round_.prompts for round_ in recorded],
                    on_round=begin,
                    on_request=lambda: progress.advance(task),
                    on_write_back=lambda: progress.update(task, description="waiting for pages to be written back"),
                )
                progress.update(task, description="taking it down")
        return rounds


def _introduce(console: Console, options: argparse.Namespace, workload: Workload, refusal: str | None) -> None:
    console.print(
        f"{workload.agents} agents x {workload.rounds} rounds, contexts of {workload.first_tokens:,} to "
        f"{workload.longest_tokens:,} tokens, 16 KB of KV cache per token, fp32, greedy."
    )
    if options.loopback or refusal is not None:
        if refusal is not None and not options.loopback:
            console.print(f"[yellow]{escape(refusal)}")
        console.print(
            "[yellow]On loopback: the tokens and the servers' own byte counters are as good as ever, but there are no "
            "links whose counters could confirm them, and no NIC limits: times say nothing about several NICs."
        )
    else:
        console.print(
            f"Every server is a node of its own: storage link {options.snic_mbit} Mbit/s, compute link "
            f"{options.cnic_mbit:,} Mbit/s, both directions. Link bytes are the links' own counters."
        )


def _play_both(options: argparse.Namespace) -> dict[str, Any]:
    workload = Workload(agents=options.agents, rounds=options.rounds)
    refusal = missing_requirement()
    network = None
    if not options.loopback and refusal is None:
        network = NetworkSpec(options.snic_mbit * 1_000_000, options.cnic_mbit * 1_000_000)
    player = Player(options, workload, network)
    _introduce(player.console, options, workload, refusal)

    # Contexts of all agents fit into device memory with some room, their pages into host memory.
    pool_tokens = max(16_384, -(-(workload.agents * (workload.longest_tokens + 512)) // 1024) * 1024)
    connector = None if options.connector == "none" else options.connector
    settings = {"max_total_tokens": pool_tokens, "hicache_ratio": 1.5}
    pair = dualpath_pair(kv_connector=connector, **settings)
    ours = player.run("dualpath", pair)
    player.console.print(report.round_table("dualpath", ours))
    stock_servers = stock_pair(decode_hicache=options.stock == "decode-hicache", **settings)
    stock = player.run("stock", stock_servers, recorded=ours)
    player.console.print(report.round_table("stock", stock))

    summary = report.summary(ours, stock, shaped=network is not None, settings=vars(options), workload=workload)
    report.print_verdict(player.console, summary)
    return summary


def _terminated(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; its exit status."""
    options = parse_arguments(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    start = time.monotonic()
    try:
        summary = _play_both(options)
    except TestbedError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted; everything it had started is gone.", file=sys.stderr)
        return 130
    summary["total_s"] = round(time.monotonic() - start, 1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "demo.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{path} holds it all ({summary['total_s']:.0f} s).")
    return 0 if all(check["holds"] for check in summary["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
