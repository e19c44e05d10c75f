"""Pictures of a result: what each storage link carried, job times against their limits, distributions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed, and none is looked for
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.compare.schema import Repetition, Result
from benchmarks.load.measures import Record

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")  # told apart by most eyes
_BIN_S = 1.0


def draw(result: Result, out: Path) -> tuple[str, ...]:
    """Write what can be drawn of a result into a directory; the names of the files."""
    out.mkdir(parents=True, exist_ok=True)
    pictures: list[tuple[str, Figure | None]] = [
        ("nic_utilisation.png", _links_over_time(result)),
        ("job_times.png", _job_times(result)),
        ("read_time.png", _distribution(result, "read time, s", lambda record: record.read_s)),
        ("ttft.png", _distribution(result, "time to first token, s", lambda record: record.ttft_s)),
        ("sustained_rate.png", _sustained(result)),
    ]
    names = []
    for name, figure in pictures:
        if figure is not None:
            figure.savefig(out / name, dpi=110)
            names.append(name)
    return tuple(names)


def _colour(result: Result, system: str) -> str:
    return _COLOURS[result.systems.index(system) % len(_COLOURS)]


def _group(result: Result, system: str) -> list[Repetition]:
    return [repetition for repetition in result.repetitions if repetition.system == system]


def _typical(group: list[Repetition]) -> Repetition:
    """The repetition whose job took the median time."""
    return sorted(group, key=lambda repetition: repetition.measured.jct_s)[len(group) // 2]


def _links_over_time(result: Result) -> Figure | None:
    """One row per system, of its typical repetition: storage links on the left, compute links on the right."""
    shown = [_typical(_group(result, system)) for system in result.systems if _group(result, system)]
    shown = [repetition for repetition in shown if repetition.probe_bytes_per_s and len(repetition.samples.times_s) > 2]
    if not shown:
        return None
    cnic_bytes_per_s = None if result.settings.cnic_mbit is None else result.settings.cnic_mbit * 1e6 / 8
    columns = 1 if cnic_bytes_per_s is None else 2
    figure = Figure(figsize=(6.5 * columns, 1.2 + 1.7 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), columns, sharex=True, sharey=True, squeeze=False)
    for row, repetition in zip(grid, shown, strict=True):
        rates = repetition.probe_bytes_per_s
        _draw_links(row[0], repetition, {f"{node}/storage/rx": rate for node, rate in rates.items()})
        row[0].set_title(f"{repetition.system}: storage NICs", loc="left", fontsize=10)
        if cnic_bytes_per_s is not None:
            _draw_links(row[1], repetition, {f"{node}/compute/rx": cnic_bytes_per_s for node in rates})
            row[1].set_title(f"{repetition.system}: compute NICs", loc="left", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("seconds since the first request (grey: requests in flight)")
    figure.suptitle("What each node received: storage as share of plain TCP, compute as share of its rate", fontsize=11)
    return figure


def _draw_links(axes: Axes, repetition: Repetition, full_bytes_per_s: dict[str, float]) -> None:
    """One line per link, in the order of nodes; windows in which requests were in flight are grey."""
    for number, (link, full) in enumerate(full_bytes_per_s.items()):
        times, shares = _rate_series(repetition, link, full)
        label = link.partition("/")[0]
        axes.plot(times, shares, color=_COLOURS[number % len(_COLOURS)], label=label, linewidth=1.4)
    for start_s, end_s in repetition.windows_s:
        axes.axvspan(start_s, end_s, color="#000000", alpha=0.04, linewidth=0)
    axes.set_ylim(0, 1.25)
    axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper right", fontsize=8, ncols=4, frameon=False)


def _rate_series(repetition: Repetition, link: str, full_bytes_per_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the full rate in bins of a second: finer ones show the token bucket, not the load."""
    times = np.asarray(repetition.samples.times_s)
    carried = np.asarray(repetition.samples.link_bytes.get(link, [0] * len(times)), dtype=float)
    edges = np.arange(times[0], times[-1], min(_BIN_S, (times[-1] - times[0]) / 4))
    at_edges = np.interp(edges, times, carried)
    return (edges[:-1] + edges[1:]) / 2, np.diff(at_edges) / np.diff(edges) / full_bytes_per_s


def _job_times(result: Result) -> Figure | None:
    if not result.measured:
        return None
    figure = Figure(figsize=(8, 1.2 + 0.55 * len(result.measured)), layout="constrained")
    axes: Axes = figure.subplots()
    for place, (system, measured) in enumerate(result.measured.items()):
        axes.barh(place, measured.jct_s, color=_colour(result, system), alpha=0.85, height=0.6)
        spread = [repetition.measured.jct_s for repetition in _group(result, system)]
        axes.plot(spread, [place] * len(spread), "|", color="black", markersize=9)
        limit = result.throughput_limit_tokens_per_s.get(system)
        if limit:
            least_s = measured.jct_s * measured.throughput_tokens_per_s / limit
            axes.plot([least_s, least_s], [place - 0.42, place + 0.42], color="black", linewidth=2.2, linestyle=":")
        axes.text(measured.jct_s, place, f"  {measured.jct_s:.1f} s", va="center", fontsize=9)
    axes.set_yticks(range(len(result.measured)), list(result.measured))
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.set_xlabel("job completion time, s (strokes: repetitions; dotted: limit by the storage links it may use)")
    return figure


def _distribution(result: Result, label: str, value: Callable[[Record], float | None]) -> Figure | None:
    """Share of requests that took at most so long, all repetitions together."""
    series = {}
    for system in result.systems:
        values = [value(record) for repetition in _group(result, system) for record in repetition.records]
        known = sorted(one for one in values if one is not None)
        if known:
            series[system] = known
    if not series:
        return None
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes: Axes = figure.subplots()
    for system, known in series.items():
        shares = np.arange(1, len(known) + 1) / len(known)
        axes.step(known, shares, where="post", color=_colour(result, system), label=system, linewidth=1.6)
    axes.set_xlabel(label)
    axes.set_ylabel("share of requests")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    return figure


def _sustained(result: Result) -> Figure | None:
    if not result.sustained:
        return None
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes: Axes = figure.subplots()
    for system, found in result.sustained.items():
        trials = sorted(found.trials, key=lambda trial: trial.agents_per_s)
        axes.plot([trial.agents_per_s for trial in trials], [trial.share_within for trial in trials], "o-",
                  color=_colour(result, system), label=f"{system}: {found.agents_per_s:.3f}/s")  # fmt: skip
        axes.axvline(found.agents_per_s, color=_colour(result, system), linestyle=":", linewidth=1)
    axes.axhline(result.settings.slo.share, color="black", linewidth=0.8)
    axes.set_xlabel("agents per second")
    axes.set_ylabel("share within the objective")
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=8)
    return figure
