"""The command line of the testbed: `up`, `down`, `status`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.testbed import runs, up
from benchmarks.testbed.errors import TestbedError
from benchmarks.testbed.state import recorded_runs
from benchmarks.testbed.store import REPOSITORY

app = typer.Typer(
    help="A cluster on this machine: networks with shaped links, a store, prefill and decode servers, a router.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Connector(StrEnum):
    """What the servers are started with."""

    DUALPATH = "dualpath"
    NONE = "none"


class Transfer(StrEnum):
    """What carries pages between servers."""

    MOONCAKE = "mooncake"
    NIXL = "nixl"


class StoreKind(StrEnum):
    """Where pages are kept."""

    MOONCAKE = "mooncake"
    FILE = "file"


class Router(StrEnum):
    """What sends requests to the servers."""

    GATEWAY = "gateway"
    MINI_LB = "mini_lb"


class Model(StrEnum):
    """Which model is made and served."""

    IDENTITY = "identity"
    SPEED = "speed"
    MLA = "mla"


@app.command("up")
def up_command(
    prefill: Annotated[int, typer.Option(min=1, help="Prefill servers, each on a node of its own.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="Decode servers, each on a node of its own.")] = 1,
    connector: Annotated[Connector, typer.Option(help="--kv-connector of all servers; none is stock SGLang.")] = (
        Connector.DUALPATH
    ),
    policy: Annotated[str | None, typer.Option(help="--dualpath-policy of all servers.")] = None,
    transfer: Annotated[Transfer, typer.Option(help="--disaggregation-transfer-backend of all servers.")] = (
        Transfer.MOONCAKE
    ),
    snic_mbit: Annotated[int, typer.Option(min=0, help="Rate of each storage link, Mbit/s; 0: no limit.")] = 200,
    cnic_mbit: Annotated[int, typer.Option(min=0, help="Rate of each compute link, Mbit/s; 0: no limit.")] = 1600,
    loopback: Annotated[bool, typer.Option("--loopback", help="No networks: all on 127.0.0.1, without root.")] = False,
    store: Annotated[StoreKind, typer.Option(help="Storage of KV pages.")] = StoreKind.MOONCAKE,
    store_gib: Annotated[float, typer.Option(min=0.1, help="Memory of the Mooncake store, GiB.")] = 3.0,
    router: Annotated[Router, typer.Option(help="The Rust gateway, or the Python load balancer.")] = Router.GATEWAY,
    model: Annotated[
        Model, typer.Option(help="identity: fp32, GQA; mla: fp32, MLA; speed: bf16, the model of reported results.")
    ] = Model.IDENTITY,
    decode_hicache: Annotated[
        bool, typer.Option("--decode-hicache/--no-decode-hicache", help="HiCache flags on decode servers, too.")
    ] = True,
    max_total_tokens: Annotated[int, typer.Option(min=1024, help="Tokens of each server's device pool.")] = 24_000,
    hicache_ratio: Annotated[float, typer.Option(min=1.0, help="Host pool, as a multiple of the device pool.")] = 1.5,
    log_dir: Annotated[Path | None, typer.Option(help="Where logs go; a directory under out/testbed if not given.")] = (
        None
    ),
    detach: Annotated[bool, typer.Option("--detach", help="Return when all is ready; `down` ends it.")] = False,
    owner: Annotated[bool, typer.Option("--owner", hidden=True)] = False,
) -> None:
    """Start a cluster and keep it up until Ctrl-C or SIGTERM. The memory that it will take is printed first."""
    options = up.UpOptions(
        prefill=prefill,
        decode=decode,
        connector=connector.value,
        policy=policy,
        transfer=transfer.value,  # type: ignore[arg-type]
        snic_mbit=snic_mbit,
        cnic_mbit=cnic_mbit,
        loopback=loopback,
        store=store.value,  # type: ignore[arg-type]
        store_gib=store_gib,
        router=router.value,  # type: ignore[arg-type]
        model=model.value,  # type: ignore[arg-type]
        decode_hicache=decode_hicache,
        max_total_tokens=max_total_tokens,
        hicache_ratio=hicache_ratio,
    )
    log_dir = log_dir or up.new_log_dir()
    try:
        up.check(options)
        if detach:
            run = up.start_detached(_arguments(options, log_dir), log_dir, say=_say)
            _say(f"`python -m benchmarks.testbed down {run.name}` ends it.")
        else:
            up.stay_up(up.cluster_spec(options, REPOSITORY / "out" / "models"), log_dir, detached=owner, say=_say)
    except TestbedError as error:
        _fail(error)
    except KeyboardInterrupt:
        _say("Interrupted; everything that was started is gone.")
        raise typer.Exit(130) from None


@app.command()
def down(
    name: Annotated[str | None, typer.Argument(help="A run, as `status` names it.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every run, also demos and benchmarks in progress.")
    ] = False,
) -> None:
    """End a run and remove what it made: only what its record names. Without NAME: dead runs and detached ones."""
    if name is not None and everything:
        _fail("NAME and --all exclude each other.")
    try:
        chosen = list(runs.runs_to_end(name, everything=everything))
        for run in chosen:
            made = f"{len(run.processes)} processes, {len(run.namespaces)} namespaces, {len(run.links)} links"
            runs.end(run)
            _say(f"{run.name}: removed {made}.")
    except TestbedError as error:
        _fail(error)
    others = [run for run in recorded_runs() if run.owner_pid != os.getpid()]
    for run in others:
        _say(f"{run.name}: left alone, process {run.owner_pid} runs it; `down {run.name}` ends it.")
    if not chosen and not others:
        _say("No run has left anything behind.")


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with all that is known.")] = False,
) -> None:
    """List the runs on this machine: processes, addresses, and the bytes that each link carried."""
    found = [runs.status_of(run) for run in recorded_runs() if run.owner_pid != os.getpid()]
    if as_json:
        typer.echo(json.dumps({"runs": found}, indent=1))
        return
    if not found:
        _say("No run.")
    for run in found:
        _show(run)


app.command("list", hidden=True, help="The same as `status`.")(status)


def _show(run: Mapping[str, Any]) -> None:
    owner = run["owner"]
    by = f"{run['command'] or 'a program'}{' in the background' if run['detached'] else ''}"
    _say(f"{run['name']}: {by}, process {owner['pid']} {'runs' if owner['alive'] else 'is gone'}.")
    if run["log_dir"]:
        _say(f"Logs: {run['log_dir']}")
    table = Table("process", "pid", "", "address", "storage in / out, MB", "compute in / out, MB", title_justify="left")
    names = [process["name"] for process in run["processes"]]
    for process in run["processes"]:
        links = run["link_bytes"].get(process["name"], {})
        table.add_row(
            process["name"],
            str(process["pid"]),
            "alive" if process["alive"] else "[red]gone",
            run["urls"].get(process["name"], ""),
            _megabytes(links.get("storage")),
            _megabytes(links.get("compute")),
        )
    for node, links in run["link_bytes"].items():
        if node not in names:
            table.add_row(
                f"node {node}", "", "", "", _megabytes(links.get("storage")), _megabytes(links.get("compute"))
            )
    if table.row_count:
        _console().print(table)


def _megabytes(link: Mapping[str, int] | None) -> str:
    return "" if link is None else f"{link['rx_bytes'] / 1e6:,.1f} / {link['tx_bytes'] / 1e6:,.1f}"


def _arguments(options: up.UpOptions, log_dir: Path) -> list[str]:
    """The command line that means these options, for the process that owns a detached cluster."""
    arguments = ["--owner", "--log-dir", str(log_dir.absolute())]
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')}"
        if name == "decode_hicache":
            arguments.append(flag if value else "--no-decode-hicache")
        elif value is True:
            arguments.append(flag)
        elif value is not None and value is not False:
            arguments += [flag, str(value)]
    return arguments


def _console() -> Console:
    console = Console(highlight=False)
    # A pipe has no width: cut tables would be of no use to anybody.
    return console if console.is_terminal else Console(highlight=False, width=140)


def _say(line: str) -> None:
    typer.echo(line)


def _fail(error: TestbedError | str) -> None:
    typer.echo(f"testbed: {error}", err=True)
    raise typer.Exit(2)
