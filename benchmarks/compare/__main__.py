"""`python -m benchmarks.compare`: systems side by side, each behind links of limited rate."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape

from benchmarks.compare.baseline import TOLERANCE, below_ratio, regressions
from benchmarks.compare.presets import PRESETS
from benchmarks.compare.schema import Result, ResultError, Settings, load_result, save
from benchmarks.compare.systems import UnknownSystemError
from benchmarks.load.traces import TraceError
from benchmarks.testbed import TestbedError, missing_requirement

COULD_NOT_RUN = 2
_LEAST_WIDTH = 190  # of the table of systems: narrower terminals wrap lines, which is easier to read than cut numbers

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
def compare(
    preset: Annotated[str | None, typer.Option(help=f"One of: {', '.join(PRESETS)}.")] = None,
    out: Annotated[Path, typer.Option(help="Directory of result.json, report.md and plots.")] = Path("out/compare"),
    systems: Annotated[str | None, typer.Option(help="Systems instead of the preset's, separated by commas.")] = None,
    repetitions: Annotated[int | None, typer.Option(min=1, help="Turns of each system.")] = None,
    agents: Annotated[int | None, typer.Option(min=1)] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Measured rounds of each agent.")] = None,
    in_flight: Annotated[int | None, typer.Option(min=1, help="Requests in flight per prefill server.")] = None,
    contexts: Annotated[str | None, typer.Option(help="Tokens of the shortest and longest context: 6000-7600.")] = None,
    snic_mbit: Annotated[int | None, typer.Option(min=0, help="Rate of storage links, Mbit/s; 0: no limit.")] = None,
    cnic_mbit: Annotated[int | None, typer.Option(min=0, help="Rate of compute links, Mbit/s; 0: no limit.")] = None,
    trace: Annotated[str | None, typer.Option(help="Trace file, or paper:32K, paper:48K, paper:64K.")] = None,
    load: Annotated[float | None, typer.Option(min=0.01, help="Poisson presets: share of all storage links.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides all token ids and arrivals.")] = None,
    loopback: Annotated[bool, typer.Option("--loopback", help="No namespaces and links: bytes, no speeds.")] = False,
    keep_servers: Annotated[bool, typer.Option("--keep-servers", help="Of a single system, between turns.")] = False,
    baseline: Annotated[Path | None, typer.Option(help="Earlier result.json: exit 1 on a regression.")] = None,
    min_ratio: Annotated[float | None, typer.Option(help="Exit 1 below this throughput ratio to sgl_mc.")] = None,
    tolerance: Annotated[float, typer.Option(help="Share by which a ratio may fall below the baseline's.")] = TOLERANCE,
    result: Annotated[Path | None, typer.Option(help="Judge and draw this result.json; run nothing.")] = None,
    merge: Annotated[list[Path] | None, typer.Option(help="Result of other systems, joined to this one.")] = None,
    router: Annotated[str | None, typer.Option(help="Router of servers that run already: no testbed.")] = None,
    server: Annotated[list[str] | None, typer.Option(help="NAME=URL of each of them (prefill=…, decode=…).")] = None,
    nic: Annotated[list[str] | None, typer.Option(help="SERVER/storage=DEVICE of this machine, for bytes.")] = None,
    page_tokens: Annotated[int | None, typer.Option(min=1, help="--page-size of those servers; 64.")] = None,
    kv_bytes: Annotated[int | None, typer.Option(min=1, help="KV bytes per token of their model; 16384.")] = None,
) -> None:
    """Measure systems side by side and write result.json, report.md and plots.

    Exit status: 0 when the run is valid and not worse than asked for, 1 otherwise, 2 when it could not run.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    console = Console(highlight=False)
    if console.width < _LEAST_WIDTH:
        console = Console(highlight=False, width=_LEAST_WIDTH)
    try:
        others = [load_result(path) for path in merge or []]  # first: a name mistyped must not cost a run
        compared_with = None if baseline is None else load_result(baseline)
        if result is not None:
            measured = _judged_again(load_result(result), console)
        else:
            settings = _settings(
                preset,
                {"systems": systems, "repetitions": repetitions, "agents": agents, "rounds": rounds, "trace": trace,
                 "snic_mbit": snic_mbit, "cnic_mbit": cnic_mbit, "load": load, "seed": seed, "contexts": contexts,
                 "in_flight_per_prefill": in_flight, "page_tokens": page_tokens, "kv_bytes_per_token": kv_bytes},
                namespaces=not loopback and router is None, deployed=router is not None, console=console,
            )  # fmt: skip
            measured = _measure(settings, out, console, keep_servers, router, server or [], nic or [])
            save(measured, out / "result.json")  # whatever becomes of the rest
        if others:
            measured = _merged([measured, *others])
    except ModuleNotFoundError as error:
        console.print(f"[red]compare: {escape(str(error))}: install the benchmark's needs, as `make setup` does.")
        raise typer.Exit(COULD_NOT_RUN) from error
    except (TestbedError, TraceError, ResultError, UnknownSystemError, typer.BadParameter) as error:
        console.print(f"[red]compare: {escape(str(error))}")
        raise typer.Exit(COULD_NOT_RUN) from error
    except KeyboardInterrupt as error:
        console.print("compare: interrupted; everything it had started is gone.")
        raise typer.Exit(130) from error
    _publish(measured, out, console)
    wrong = [] if measured.valid else [f"The run is invalid: {'; '.join(measured.reasons)}."]
    if measured.valid and compared_with is not None:
        wrong += regressions(measured, compared_with, tolerance=tolerance)
    if measured.valid and min_ratio is not None:
        wrong += below_ratio(measured, min_ratio)
    for sentence in wrong:
        console.print(f"[bold red]{escape(sentence)}")
    raise typer.Exit(1 if wrong else 0)


def _settings(
    preset: str | None, changes: dict[str, Any], *, namespaces: bool, deployed: bool, console: Console
) -> Settings:
    if preset is None or preset not in PRESETS:
        raise typer.BadParameter(f"Name a preset with --preset: {', '.join(PRESETS)}.")
    settings = PRESETS[preset]
    given = {name: value for name, value in changes.items() if value is not None}
    if "systems" in given:
        given["systems"] = tuple(name.strip() for name in given["systems"].split(",") if name.strip())
    if "contexts" in given:
        given |= _contexts(given["contexts"], settings)
    for name in ("snic_mbit", "cnic_mbit"):
        # The rates of real links are not those of the testbed, and have to be said.
        if given.get(name, 0 if deployed else None) == 0:
            given[name] = None
    if not deployed and {"page_tokens", "kv_bytes_per_token"} & set(given):
        raise typer.BadParameter("--page-tokens and --kv-bytes describe servers that run already: give --router, too.")
    if settings.mode == "online" and given.get("repetitions", 1) != 1:
        raise typer.BadParameter("The search for a sustained rate runs once per system: leave out --repetitions.")
    if settings.mode == "poisson" and given.get("rounds", 1) != 1:
        raise typer.BadParameter("Caches cannot be dropped between rounds while others read: take --rounds 1 here.")
    if settings.mode != "offline" and given.get("snic_mbit", settings.snic_mbit) is None:
        raise typer.BadParameter("Requests arrive at a share of what the links carry: say their rate with --snic-mbit.")
    if namespaces and preset == "smoke" and (refusal := missing_requirement()):
        console.print(f"[yellow]{escape(refusal)} Going on over loopback.")
        namespaces = False
    return msgspec.structs.replace(settings, namespaces=namespaces, **given)


def _measure(
    settings: Settings, out: Path, console: Console, keep_servers: bool, router: str | None, server: list[str],
    nic: list[str],
) -> Result:  # fmt: skip
    # Imports what --help and --result do not need, and matplotlib, which must not be missed after the run only.
    from benchmarks.compare import plots, runner  # noqa: F401

    start = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - start:6.0f} s[/]  {escape(line)}")

    if router is not None and not server:
        raise typer.BadParameter("Caches are dropped on every server: name each with --server NAME=URL.")
    if router is None:
        return runner.run(settings, out=out, say=say, keep_servers=keep_servers)
    deployment = runner.Deployment(router, _pairs(server, "--server"), _pairs(nic, "--nic"), settings.snic_mbit)
    return runner.run_deployed(settings, deployment, say=say)


def _contexts(words: str, settings: Settings) -> dict[str, Any]:
    """Settings of `6000-7600`: what is new in a round comes on top."""
    shortest, dash, longest = words.partition("-")
    if not (dash and shortest.isdecimal() and longest.isdecimal() and 0 < int(shortest) <= int(longest)):
        raise typer.BadParameter(f"--contexts takes two numbers of tokens, as 6000-7600, and not {words!r}.")
    room = settings.longest_tokens - settings.contexts[1]
    return {"contexts": (int(shortest), int(longest)), "longest_tokens": int(longest) + room}


def _pairs(words: list[str], option: str) -> dict[str, str]:
    found = dict(word.partition("=")[::2] for word in words)
    if not all(found) or not all(found.values()):
        raise typer.BadParameter(f"{option} takes NAME=VALUE.")
    return found


def _judged_again(measured: Result, console: Console) -> Result:
    """Ratios and checks as this version computes them; as they are where the trace is not at hand."""
    try:
        return _merged([measured])
    except TraceError as error:
        console.print(f"Ratios and checks stay as the run made them: {escape(str(error))}")
        return measured


def _merged(results: list[Result]) -> Result:
    from benchmarks.compare.runner import workload_of
    from benchmarks.compare.summary import merge

    try:
        return merge(results, workload_of(results[0].settings))
    except TraceError:
        raise
    except ValueError as error:
        raise ResultError(f"These results cannot be joined: {error}") from error


def _publish(measured: Result, out: Path, console: Console) -> None:
    from benchmarks.compare.plots import draw
    from benchmarks.compare.report import markdown

    save(measured, out / "result.json")
    (out / "report.md").write_text(markdown(measured, draw(measured, out)))
    console.print(Markdown(markdown(measured)))
    console.print(f"{out / 'result.json'}, report.md and plots hold it all ({measured.total_s:.0f} s).")


def _terminated(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    app()
