"""Tables, sums and promises of the demo."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.rounds import Round, Workload
from benchmarks.testbed import KV_BYTES_PER_TOKEN, PAGE_TOKENS

LEAST_SHARE = 0.25  # of the hit payload, that each side must have read
LEAST_READ = 0.98  # times the hit payload: less would mean that reads were not counted
MOST_READ = 1.02  # times the hit payload, that both together may have read
MOST_LINK = 1.06  # the same by the links' counters, which see headers and acknowledgements too

_HITS = {"fresh": "-", "storage": "storage", "decode_memory": "memory of D"}


def round_table(system: str, rounds: Sequence[Round]) -> Table:
    """One row per round; bytes in MB (10^6), P for the prefill and D for the decode server, times in seconds."""
    table = Table(
        title=f"{system}: tokens of all agents; MB hit, read from storage by P(refill) and D(ecode), hopped D to P",
        title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("round", justify="right")
    table.add_column("hits from")
    for column in ("prompt", "hit", "new", "MB hit", "read P + D", "links P + D", "hopped", "TTFT mean, worst"):
        table.add_column(column, justify="right", no_wrap=True)
    for index, round_ in enumerate(rounds, start=1):
        traffic = round_.traffic
        worst_s = max(generation.ttft_s for generation in round_.generations)
        table.add_row(
            str(index),
            _HITS[round_.kind],
            f"{round_.prompt_tokens:,}",
            f"{round_.hit_tokens:,}",
            f"{round_.new_tokens:,}",
            _mb(bytes_hit(round_)),
            f"{_mb(traffic.read_prefill)} + {_mb(traffic.read_decode)}",
            f"{_mb(traffic.link_prefill)} + {_mb(traffic.link_decode)}",
            _mb(traffic.hopped),
            f"{round_.mean_ttft_s:.1f}, {worst_s:.1f}",
        )
    return table


def bytes_hit(round_: Round) -> int:
    """KV bytes of the prompt tokens that were loaded instead of computed."""
    return round_.hit_tokens * KV_BYTES_PER_TOKEN


def summary(
    ours: Sequence[Round], stock: Sequence[Round], *, shaped: bool, settings: Mapping[str, Any], workload: Workload
) -> dict[str, Any]:
    """What is written to demo.json. Sums are over the rounds loaded from storage; the last round has its own entry."""
    stored = [round_ for round_ in ours if round_.kind == "storage"]
    sums = _sums(stored)
    different = [
        f"round {index}, agent {agent}"
        for index, (mine, theirs) in enumerate(zip(ours, stock, strict=True), start=1)
        for agent, pair in enumerate(zip(mine.outputs, theirs.outputs, strict=True), start=1)
        if pair[0] != pair[1]
    ]
    return {
        "outputs_identical": not different,
        "outputs_different": different,
        **sums,
        "shaped": shaped,
        "last_round": _sums([ours[-1]]),
        "checks": _checks(ours, sums, different=different, shaped=shaped),
        "rounds": [_entry(mine, theirs) for mine, theirs in zip(ours, stock, strict=True)],
        "workload": vars(workload) | {"longest_tokens": workload.longest_tokens},
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
    }


def print_verdict(console: Console, result: Mapping[str, Any]) -> None:
    """One line per promise, and how long the loaded rounds took on both systems."""
    loaded = [entry for entry in result["rounds"] if entry["hits_from"] == "storage"]
    ours = sum(entry["ttft_mean_s"] for entry in loaded) / len(loaded)
    stock = sum(entry["stock"]["ttft_mean_s"] for entry in loaded) / len(loaded)
    console.print(f"Mean time to first token when loading from storage: {ours:.1f} s, stock {stock:.1f} s.")
    for check in result["checks"]:
        answer = "[green]yes[/]" if check["holds"] else "[bold red]NO [/]"
        console.print(f"{answer}  {check['says']}")


def _sums(rounds: Iterable[Round]) -> dict[str, Any]:
    rounds = list(rounds)
    shaped = all(round_.traffic.link_prefill is not None for round_ in rounds)
    links = {
        "prefill_storage_received": sum(round_.traffic.link_prefill or 0 for round_ in rounds),
        "decode_storage_received": sum(round_.traffic.link_decode or 0 for round_ in rounds),
        "prefill_compute_received": sum(round_.traffic.link_hopped or 0 for round_ in rounds),
    }
    return {
        "bytes_read_prefill": sum(round_.traffic.read_prefill for round_ in rounds),
        "bytes_read_decode": sum(round_.traffic.read_decode for round_ in rounds),
        "bytes_hit": sum(bytes_hit(round_) for round_ in rounds),
        "bytes_hopped": sum(round_.traffic.hopped for round_ in rounds),
        "link_bytes": links if shaped else None,
    }


def _checks(
    ours: Sequence[Round], sums: Mapping[str, Any], *, different: Sequence[str], shaped: bool
) -> list[dict[str, Any]]:
    hit = max(1, sums["bytes_hit"])
    prefill, decode = sums["bytes_read_prefill"] / hit, sums["bytes_read_decode"] / hit
    checks = [
        _check(not different, "every output token is the same as stock's"
               + (f": differs in {', '.join(different)}" if different else "")),
        _check(min(len(round_.outputs) for round_ in ours) > 0 and _hits_complete(ours),
               "every page of the previous round's prompts was a hit"),
        _check(LEAST_READ <= prefill + decode <= MOST_READ,
               f"storage was read once: {prefill + decode:.3f} of the hit bytes (at most {MOST_READ})"),
    ]  # fmt: skip
    if shaped:  # without NIC limits one side may well be fast enough alone
        checks.append(
            _check(
                min(prefill, decode) >= LEAST_SHARE,
                f"both sides read: prefill {prefill:.2f}, decode {decode:.2f} of the hit bytes (least {LEAST_SHARE})",
            )
        )
        links = sums["link_bytes"]
        carried = (links["prefill_storage_received"] + links["decode_storage_received"]) / hit
        checks.append(
            _check(carried <= MOST_LINK, f"the links confirm it: {carried:.3f} of the hit bytes (at most {MOST_LINK})")
        )
    return [*checks, *_last_round_checks(ours[-2], ours[-1])]


def _last_round_checks(before: Round, last: Round) -> list[dict[str, Any]]:
    """The decode server held the previous prompts' whole pages: they are hopped, and nothing of them is read."""
    held_bytes = sum(_whole_pages(prompt) * PAGE_TOKENS for prompt in before.prompts) * KV_BYTES_PER_TOKEN
    held = min(held_bytes, bytes_hit(last))
    beyond = bytes_hit(last) - held
    traffic = last.traffic
    read = traffic.read_prefill + traffic.read_decode
    checks = [
        _check(traffic.hopped >= held, f"last round: hopped {_mb(traffic.hopped)} MB, held {_mb(held)} MB"),
        _check(read <= beyond, f"last round: read {_mb(read)} MB from storage (at most {_mb(beyond)} MB not held)"),
    ]
    if traffic.link_prefill is not None and traffic.link_decode is not None:
        carried = traffic.link_prefill + traffic.link_decode
        most = beyond * MOST_LINK + 0.02 * held
        checks.append(_check(carried <= most, f"the links confirm it: {_mb(carried)} MB received from storage"))
    return checks


def _hits_complete(rounds: Sequence[Round]) -> bool:
    return all(
        generation.cached_tokens >= _whole_pages(prompt) * PAGE_TOKENS
        for before, after in itertools.pairwise(rounds)
        for prompt, generation in zip(before.prompts, after.generations, strict=True)
    )


def _whole_pages(prompt: Sequence[int]) -> int:
    return len(prompt) // PAGE_TOKENS


def _check(holds: bool, says: str) -> dict[str, Any]:
    return {"holds": bool(holds), "says": says}


def _entry(ours: Round, stock: Round) -> dict[str, Any]:
    return _measured(ours) | {
        "outputs_identical": ours.outputs == stock.outputs,
        "outputs": [list(output) for output in ours.outputs],
        "stock": _measured(stock),
    }


def _measured(round_: Round) -> dict[str, Any]:
    return {
        "hits_from": round_.kind,
        "prompt_tokens": round_.prompt_tokens,
        "hit_tokens": round_.hit_tokens,
        "new_tokens": round_.new_tokens,
        **_sums([round_]),
        "ttft_mean_s": round(round_.mean_ttft_s, 3),
        "ttft_s": [round(generation.ttft_s, 3) for generation in round_.generations],
        "wall_s": round(round_.wall_s, 3),
        "write_back_s": round(round_.write_back_s, 3),
    }


def _mb(count: int | float | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.1f}"
