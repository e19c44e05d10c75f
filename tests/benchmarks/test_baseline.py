"""What CI makes of a result: worse than a baseline, or below a ratio?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from benchmarks.compare.__main__ import app
from benchmarks.compare.baseline import below_ratio, regressions
from benchmarks.compare.presets import PRESETS
from benchmarks.compare.runner import workload_of
from benchmarks.compare.schema import Trial, save
from benchmarks.compare.summary import summarise
from benchmarks.compare.sustained import search


def test_the_same_result_is_no_regression(result: Any) -> None:
    assert regressions(result, result) == []


def test_a_lower_ratio_beyond_its_interval_is_a_regression(made: Any, result: Any) -> None:
    worse = made.result({"sgl_mc": made.stock, "dualpath:split": [1.2 * value for value in made.ours]})
    assert "dualpath:split/sgl_mc" in regressions(worse, result)[0]
    assert regressions(result, worse) == []


def test_reads_that_take_longer_are_a_regression_where_they_are_alone(made: Any) -> None:
    systems = ("dualpath:shorter_queue", "dualpath:split")
    made.settings = msgspec.structs.replace(made.settings, mode="poisson", systems=systems)

    def half_load(read_s: float) -> Any:
        theirs, ours = ([made.repetition(system, number, 50.0) for number in range(5)] for system in systems)
        for one in ours:
            one.measured.read_mean_s = read_s
        both = [*theirs, *ours]
        return summarise(made.settings, workload_of(made.settings), both, sustained={}, versions={}, total_s=1)

    for one in (good := half_load(0.3)), half_load(0.29):
        assert regressions(one, good) == []
    assert "dualpath:split/dualpath:shorter_queue: mean read time ratio 0.80" in regressions(half_load(0.4), good)[0]


def test_a_lower_sustained_rate_is_a_regression_when_its_steps_tell(made: Any, result: Any) -> None:
    def online(ours: list[bool]) -> Any:
        found = made.result({"sgl_mc": made.stock, "dualpath:split": made.ours})
        found.settings = PRESETS["online"]
        for system, held in (("sgl_mc", [True, False, False]), ("dualpath:split", ours)):
            trials = iter(held)

            def play_at(rate: float, _: int, trials: Any = trials) -> Trial:
                return Trial(rate, 1.0, next(trials), found.measured["sgl_mc"])

            found.sustained[system] = search(play_at, highest_per_s=1.0 if system == "sgl_mc" else 2.0, steps=3)
        return found

    good = online([True, True, True])
    assert regressions(good, good) == []
    assert regressions(online([True, True, False]), good) == []  # the next rate is that of the baseline
    assert "dualpath:split/sgl_mc: sustained rate ratio 1.00" in regressions(online([False, True, False]), good)[0]


def test_bytes_that_are_read_twice_are_a_regression(made: Any, result: Any) -> None:
    counted = {"prefill": 2 * made.hits * 16384}
    twice = made.result({"sgl_mc": made.stock, "dualpath:split": made.ours}, counted_read_bytes=counted)
    says = "dualpath:split read 2.000 times the hit bytes, and 1.000 times in the baseline."
    assert regressions(twice, result) == [says]
    assert regressions(twice, twice) == []


def test_a_lower_ratio_within_a_wide_interval_is_none(made: Any, result: Any) -> None:
    noisy = made.result({"sgl_mc": made.stock, "dualpath:split": [40.0, 45.0, 57.0, 62.0, 70.0]})
    assert regressions(noisy, result) == []


def test_a_baseline_of_other_settings_says_so(made: Any, result: Any) -> None:
    made.settings = msgspec.structs.replace(made.settings, snic_mbit=400)
    other = made.result({"sgl_mc": made.stock, "dualpath:split": made.ours})
    assert "other settings (snic_mbit)" in regressions(other, result)[0]


def test_a_baseline_of_another_model_says_so(made: Any, result: Any) -> None:
    other = made.result({"sgl_mc": made.stock, "dualpath:split": made.ours})
    other.versions["model"] = "smaller"
    assert "other settings (model)" in regressions(other, result)[0]


def test_an_invalid_baseline_is_none(made: Any, result: Any) -> None:
    baseline = made.result({"sgl_mc": made.stock, "dualpath:split": made.ours}, failed=1)
    assert "The baseline is an invalid run" in regressions(result, baseline)[0]


def test_stock_is_not_judged(made: Any) -> None:
    baseline = made.result({"sgl_mc": made.stock, "sgl_mc_both": made.stock, "dualpath:split": made.ours})
    twice = [2 * value for value in made.stock]
    slower = made.result({"sgl_mc": made.stock, "sgl_mc_both": twice, "dualpath:split": made.ours})
    assert regressions(slower, baseline) == []


def test_a_baseline_of_other_systems_is_not_passed_silently(made: Any, result: Any) -> None:
    assert "no system in common" in regressions(made.result({"sgl_mc": made.stock}), result)[0]


def test_the_least_ratio_is_asked_of_the_lower_end(result: Any) -> None:
    low = result.ratios["dualpath:split/sgl_mc"].throughput_ci[0]
    assert below_ratio(result, low - 0.01) == []
    assert below_ratio(result, low + 0.01)


def test_a_run_without_dualpath_is_below_any_ratio(made: Any) -> None:
    assert below_ratio(made.result({"sgl_mc": made.stock}), 0.1)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [([], 0), (["--baseline", "same.json"], 0), (["--min-ratio", "1.5"], 0), (["--min-ratio", "2.5"], 1),
     (["--baseline", "better.json"], 1), (["--baseline", "missing.json"], 2)],
)  # fmt: skip
def test_exit_status(
    made: Any, result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmarks.compare.plots.draw", lambda *_: ())
    save(result, tmp_path / "same.json")
    better = made.result({"sgl_mc": made.stock, "dualpath:split": [value / 1.5 for value in made.ours]})
    save(better, tmp_path / "better.json")
    done = CliRunner().invoke(app, ["--result", "same.json", "--out", "out", *arguments])
    assert done.exit_code == status, done.output
