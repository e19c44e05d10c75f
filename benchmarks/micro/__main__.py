"""`python -m benchmarks.micro NAME [--json]`: one microbenchmark."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.micro import control as control_benchmark
from benchmarks.micro import ledger as ledger_benchmark
from benchmarks.micro.errors import BenchmarkError
from benchmarks.micro.report import Report

app = typer.Typer(
    help="Microbenchmarks of the parts; docs/microbenchmarks.md says what each means.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_LEAST_WIDTH = 120


class Transport(StrEnum):
    """What the hop is measured over."""

    MOONCAKE = "mooncake"
    NIXL = "nixl"


AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]
Repetitions = Annotated[int, typer.Option(min=1, help="Samples of each figure.")]


@app.command()
def ledger(
    as_json: AsJson = False,
    repetitions: Repetitions = 20,
    pages: Annotated[int, typer.Option(min=8, help="Pages of the read.")] = 2000,
) -> None:
    """Claims and landings per second, front and back, with and without pages held in memory."""
    settings = ledger_benchmark.LedgerSettings(pages=pages, repetitions=repetitions)
    _print(lambda: ledger_benchmark.run(settings), as_json)


@app.command()
def control(
    as_json: AsJson = False,
    round_trips: Annotated[int, typer.Option(min=8, help="Round trips with and without a key, each.")] = 2000,
) -> None:
    """Round trip of a claim and its grant between two processes."""
    settings = control_benchmark.ControlSettings(round_trips=round_trips, warm_up=min(200, round_trips))
    _print(lambda: control_benchmark.run(settings), as_json)


def _hop_command(name: str, what: str, *, default_kib: str, default_paths: str) -> None:
    """Add a command that measures the hop. Only what is made of its samples differs, and so what is worth a sample."""

    @app.command(name, help=what)
    def command(
        as_json: AsJson = False,
        repetitions: Repetitions = 20,
        transport: Annotated[Transport, typer.Option(help="Transfer engine.")] = Transport.MOONCAKE,
        message_kib: Annotated[str, typer.Option(help="Sizes of messages in KiB, separated by commas.")] = default_kib,
        sample_mib: Annotated[int, typer.Option(min=1, help="MiB moved for one sample, or 1024 messages.")] = 256,
        paths: Annotated[
            str, typer.Option(help="What to compare, names separated by commas; all if not given.")
        ] = default_paths,
    ) -> None:
        _print(lambda: _hop(name, repetitions, transport, message_kib, sample_mib, paths), as_json)


_hop_command("hop", "Bandwidth of the hop against the bare transport.", default_kib="64,1024,16384", default_paths="")
_hop_command(
    "cpu",
    "CPU seconds per GB that the hop takes on each side.",
    default_kib="64,1024,4096,16384",
    default_paths="bare,push,reader,tcp",
)


@app.command()
def decode(
    as_json: AsJson = False,
    repetitions: Repetitions = 5,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that are loaded at once.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(min=256, help="Tokens of each.")] = 6016,
    stream_tokens: Annotated[int, typer.Option(min=100, help="Tokens that the watched stream may have.")] = 6000,
    snic_mbit: Annotated[int, typer.Option(min=1, help="Rate of each storage link, Mbit/s.")] = 200,
    cnic_mbit: Annotated[int, typer.Option(min=1, help="Rate of each compute link, Mbit/s.")] = 1600,
    loopback: Annotated[bool, typer.Option("--loopback", help="No networks: all on 127.0.0.1, without root.")] = False,
) -> None:
    """Time between tokens of a decode server while it helps. Starts real servers: minutes, and some 8 GB."""
    from benchmarks.micro import decode as decode_benchmark

    settings = decode_benchmark.DecodeSettings(
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        stream_tokens=stream_tokens,
        repetitions=repetitions,
        snic_mbit=snic_mbit,
        cnic_mbit=cnic_mbit,
        loopback=loopback,
    )
    _print(lambda: decode_benchmark.run(settings, say=_note), as_json)


def _hop(name: str, repetitions: int, transport: Transport, message_kib: str, sample_mib: int, paths: str) -> Report:
    from benchmarks.micro import hop as hop_benchmark  # imports torch

    sizes = _sizes(message_kib)
    settings = hop_benchmark.HopSettings(
        transport=transport.value,
        message_bytes=sizes,
        sample_bytes=sample_mib << 20,
        repetitions=repetitions,
        paths=tuple(paths.split(",")) if paths else tuple(hop_benchmark.PATHS),
    )
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(sizes) * len(settings.paths) * repetitions)
        samples = hop_benchmark.measure(settings, lambda sample: progress.advance(task))
    return hop_benchmark.REPORTS[name](settings, samples)


def _sizes(text: str) -> tuple[int, ...]:
    """Bytes of sizes in KiB. A message must be whole pages."""
    try:
        sizes = tuple(int(part) << 10 for part in text.split(","))
    except ValueError:
        raise BenchmarkError(f"--message-kib takes whole numbers separated by commas, not {text!r}.") from None
    wrong = [size >> 10 for size in sizes if size <= 0 or (size > 1 << 20 and size % (1 << 20))]
    if wrong:
        raise BenchmarkError(f"--message-kib: {wrong[0]} is neither at most a page of 1,024 KiB nor whole pages.")
    return sizes


def _print(run: Callable[[], Report], as_json: bool) -> None:
    from benchmarks.testbed.errors import TestbedError

    try:
        report = run()
    except (BenchmarkError, TestbedError) as error:
        typer.echo(f"micro: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=1))
        return
    console = Console(highlight=False)
    report.show(console if console.width >= _LEAST_WIDTH else Console(highlight=False, width=_LEAST_WIDTH))


def _note(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.micro")
