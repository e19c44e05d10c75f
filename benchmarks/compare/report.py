"""A result as Markdown: one table of systems, one of ratios, and what held."""

from __future__ import annotations

from collections import Counter

from benchmarks.compare.schema import Ratios, Result, Sustained
from benchmarks.compare.systems import is_dualpath

REFERENCES = ("sgl_mc", "sgl_mc_both")  # what all others are divided by in the report
DEFAULT = "dualpath:split"  # what users get without asking; divided by every other policy


_FEW_CORES = 4


def markdown(result: Result, plots: tuple[str, ...] = ()) -> str:
    """The whole report."""
    settings = result.settings
    verdict = "valid" if result.valid else "**INVALID: " + "; ".join(result.reasons) + "**"
    links = "links without limit" if settings.snic_mbit is None else f"SNIC {settings.snic_mbit} Mbit/s"
    if settings.cnic_mbit is not None:
        links += f", CNIC {settings.cnic_mbit:,} Mbit/s"
    if not settings.namespaces:
        links = "no shaped links"
    lines = [
        f"# {settings.preset}: {settings.prefill_servers} prefill and {settings.decode_servers} decode servers",
        "",
        f"{links}; {settings.agents} agents x {settings.rounds} rounds x {settings.passes} passes, {settings.mode}, "
        f"{settings.arrivals}, "
        f"trace: {settings.trace or ('synthetic, low reuse' if settings.low_reuse else 'synthetic')}; "
        f"{_how_often(result)} The run is {verdict}.",
        "",
        *_systems(result),
        "",
        f"Read time: {result.read_time_method}. Storage links: share of what a plain TCP transfer got through the same "
        "link just before, in the middle 80 % of the run. Read: payload per hit byte, by DualPath's own counters where "
        "it runs and by the links elsewhere. Written: everything the servers sent to storage, also after the job. TPOT "
        "is what clients saw; ITL the time between tokens by the decode servers' own counters. Tokens that reach a "
        "client in one burst have a TPOT of 0 and an ITL all the same.",
        "",
        *_fallbacks(result),
        *_ratios(result),
        *_sustained(result),
        "## What was checked",
        "",
        *(f"- {'yes' if check.holds else '**no**'}: {check.says}{'' if check.required else ' (for information)'}"
          for check in result.checks),
        "",
        *(f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in plots),
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in result.versions.items()) + ".",
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _how_often(result: Result) -> str:
    settings = result.settings
    if settings.mode == "online":
        waves = "1 wave" if settings.passes == 1 else f"up to {settings.passes} waves"
        return f"{settings.trial_steps} trials of each system, each of {waves} of agents."
    times = "repetition" if settings.repetitions == 1 else "repetitions"
    how = "systems measured in runs of their own" if result.measured_apart else "systems in turns"
    return f"{settings.repetitions} {times}, {how}, medians, 95 % bootstrap intervals."


def _systems(result: Result) -> list[str]:
    if not result.measured:
        return []
    rows = [
        "| system | job s | tokens/s | of its link limit | of oracle | TTFT p50 / p99 s | TTST p50 s | TPOT p50 ms "
        "| ITL mean ms | read mean / p50 s | storage links busy | read | written MB | hit GB | cores busy |",
        "|---|" + "---:|" * 14,
    ]
    for system, measured in result.measured.items():
        limit = result.throughput_limit_tokens_per_s.get(system)
        share = None if not limit else measured.throughput_tokens_per_s / limit
        busy = ", ".join(f"{name} {value:.0%}" for name, value in result.snic_busy.get(system, {}).items())
        written = result.bytes_written.get(system)
        rows.append(
            f"| {system} | {measured.jct_s:.1f} | {measured.throughput_tokens_per_s:,.0f} | {_percent(share)} "
            f"| {_percent(result.oracle_share.get(system))} "
            f"| {_number(measured.ttft_p50_s)} / {_number(measured.ttft_p99_s)} | {_number(measured.ttst_p50_s)} "
            f"| {_number(measured.tpot_p50_s, 1000, 0)} | {_number(measured.itl_mean_s, 1000, 0)} "
            f"| {_number(measured.read_mean_s)} / {_number(measured.read_p50_s)} | {busy or '-'} "
            f"| {_number(result.read_amplification.get(system), 1, 3)} "
            f"| {_number(None if written is None else float(written), 1e-6, 0)} "
            f"| {result.hit_tokens[system] * result.settings.kv_bytes_per_token / 1e9:.2f} "
            f"| {_cores(result, system)} |"
        )
    return rows


def _cores(result: Result, system: str) -> str:
    """Of a machine with a few cores each, of one with many the mean and the busiest."""
    if result.settings.deployed:
        return "-"
    each = result.core_busy.get(system, [])
    if len(each) <= _FEW_CORES:
        return ", ".join(map(_percent, each or [result.cpu_busy[system]]))
    return f"{_percent(result.cpu_busy[system])}, busiest {_percent(max(each))}"


def _fallbacks(result: Result) -> list[str]:
    lines = []
    for system in result.systems:
        counts: Counter[str] = Counter()
        for repetition in result.repetitions:
            if repetition.system == system:
                counts.update(repetition.fallbacks)
        if counts:
            reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
            lines += [f"Fallbacks of {system} in all repetitions: {reasons}.", ""]
    return lines


def _ratios(result: Result) -> list[str]:
    rows = []
    policies = [system for system in result.systems if is_dualpath(system) and system != DEFAULT]
    for below in (*REFERENCES, *policies):
        for above in result.systems if below in REFERENCES else [DEFAULT]:
            ratios = result.ratios.get(f"{above}/{below}")
            if ratios is not None:
                rows.append(_ratio_row(above, below, ratios))
    if not rows:
        return []
    return [
        "## Ratios",
        "",
        "| | throughput | job time | read mean | read p50 | TTFT p50 | TTFT p99 | TPOT p50 | ITL mean |",
        "|---|" + "---:|" * 8,
        *rows,
        "",
    ]


def _ratio_row(above: str, below: str, ratios: Ratios) -> str:
    return (
        f"| {above} / {below} | {_number(ratios.throughput)}{_interval(ratios.throughput_ci)} | {_number(ratios.jct)} "
        f"| {_number(ratios.read_mean)}{_interval(ratios.read_mean_ci)} | {_number(ratios.read_p50)} "
        f"| {_number(ratios.ttft_p50)} | {_number(ratios.ttft_p99)} | {_number(ratios.tpot_p50)} "
        f"| {_number(ratios.itl_mean)} |"
    )


def _sustained(result: Result) -> list[str]:
    if not result.sustained:
        return []
    slo = result.settings.slo
    rows = [
        f"| {system} | {'at least ' if all(trial.sustained for trial in found.trials) else ''}{found.agents_per_s:.3f} "
        f"| {', '.join(f'{trial.agents_per_s:.3f}: {trial.share_within:.0%}' for trial in found.trials)} "
        f"| {_best_links(found)} |"
        for system, found in result.sustained.items()
    ]
    return [
        "## Largest sustained rate",
        "",
        f"At least {slo.share:.0%} of requests with TTFT up to {slo.ttft_s:g} s, TPOT up to {slo.tpot_s * 1000:g} ms.",
        "",
        "| system | agents per s | trials: share of requests within | storage links busy at that rate |",
        "|---|---:|---|---|",
        *rows,
        "",
    ]


def _best_links(found: Sustained) -> str:
    held = [trial for trial in found.trials if trial.sustained and trial.agents_per_s == found.agents_per_s]
    return ", ".join(f"{name} {value:.0%}" for trial in held for name, value in trial.snic_busy.items()) or "-"


def _number(value: float | None, factor: float = 1.0, digits: int = 2) -> str:
    return "-" if value is None else f"{value * factor:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})"
