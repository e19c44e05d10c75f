"""From repetitions to result.json and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from benchmarks.compare.__main__ import app
from benchmarks.compare.plots import draw
from benchmarks.compare.presets import PRESETS
from benchmarks.compare.report import markdown
from benchmarks.compare.runner import workload_of
from benchmarks.compare.schema import ResultError, Sustained, Trial, load_result, save
from benchmarks.compare.summary import merge, summarise
from benchmarks.load.measures import Record, latencies


def test_ratios_are_of_medians_for_every_pair_in_both_directions(result: Any) -> None:
    assert set(result.ratios) == {"sgl_mc/dualpath:split", "dualpath:split/sgl_mc"}
    ours = result.ratios["dualpath:split/sgl_mc"]
    assert ours.throughput == pytest.approx(100 / 51)
    assert ours.jct == pytest.approx(51 / 100)
    assert ours.ttft_p50 == pytest.approx(1.0)
    low, high = ours.throughput_ci
    assert low <= 100 / 51 <= high


def test_names_of_the_schema_are_those_that_were_promised(result: Any) -> None:
    plain = msgspec.to_builtins(result)
    assert {"throughput", "throughput_ci", "jct", "read_p50", "read_mean", "ttft_p50", "ttft_p99", "tpot_p50"} <= set(
        plain["ratios"]["dualpath:split/sgl_mc"]
    )
    assert plain["snic_busy"]["sgl_mc"]["prefill"] == 0.97
    promised = {"schema_version", "link_bytes", "read_amplification", "bytes_written", "hit_tokens", "failed",
                "cpu_busy", "settings", "versions", "repetitions", "valid"}  # fmt: skip
    assert promised <= set(plain)


def test_a_result_survives_being_written_and_read(result: Any, tmp_path: Path) -> None:
    save(result, tmp_path / "result.json")
    again = load_result(tmp_path / "result.json")
    assert again.settings == result.settings
    assert len(again.repetitions) == 10
    assert again.ratios["dualpath:split/sgl_mc"].throughput == pytest.approx(100 / 51, rel=1e-5)
    save(again, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "result.json").read_text()


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "is not a result"), ('{"schema_version": 99}', "schema version 99"), ("{}", "is not a result")],
)
def test_another_file_is_no_result(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ResultError, match=says):
        load_result(tmp_path / "result.json")


def test_a_run_of_equal_work_is_valid(result: Any) -> None:
    assert result.valid, result.reasons
    assert result.read_amplification["dualpath:split"] == pytest.approx(1.0)


def test_a_failed_request_makes_a_run_invalid(made: Any) -> None:
    result = made.result({"sgl_mc": made.stock, "dualpath:split": made.ours}, failed=1)
    assert not result.valid
    assert "5 requests failed" in result.reasons[0]


def test_lost_hits_make_a_run_invalid(made: Any) -> None:
    result = made.result({"sgl_mc": made.stock, "dualpath:split": made.ours}, hit_tokens=made.hits * 99 // 100)
    assert not result.valid
    assert "expected hit tokens" in result.reasons[0]


def test_systems_that_hit_differently_cannot_be_compared(made: Any) -> None:
    result = made.result({"sgl_mc": made.stock})
    ours = made.result({"dualpath:split": made.ours}, hit_tokens=made.hits * 102 // 100)
    joined = merge([result, ours], workload_of(made.settings))
    assert not joined.valid
    assert "hit tokens of all systems" in joined.reasons[0]


def test_hits_that_were_still_in_memory_make_a_run_invalid(made: Any) -> None:
    record = Record(0, 0, 0.0, 1.0, 1.1, 50.0, prompt_tokens=8000, cached_tokens=6400, cached_storage_tokens=6400,
                    output_tokens=16)  # fmt: skip
    assert made.result({"sgl_mc": made.stock}, records=[record]).valid
    found = made.result({"sgl_mc": made.stock}, records=[msgspec.structs.replace(record, cached_storage_tokens=6000)])
    assert found.reasons == ["sgl_mc: 0.9375 of the hit tokens came from storage"]


def test_an_oracle_that_loads_is_none(made: Any) -> None:
    record = Record(0, 0, 0.0, 1.0, 1.1, 50.0, prompt_tokens=8000, cached_tokens=6400, cached_device_tokens=6400,
                    cached_storage_tokens=0, output_tokens=16)  # fmt: skip
    assert made.result({"oracle": made.stock}, records=[record]).valid
    evicted = msgspec.structs.replace(record, cached_device_tokens=6000, cached_storage_tokens=400)
    found = made.result({"oracle": made.stock}, records=[evicted])
    assert found.reasons == ["oracle: 0.9375 of the hit tokens came from device memory"]


def test_a_repetition_in_which_all_failed_can_be_read_again(made: Any, tmp_path: Path) -> None:
    lost = latencies([Record(0, 0, 0.0, error="lost")])
    found = made.result({"sgl_mc": made.stock, "dualpath:split": made.ours}, measured=lost, failed=1)
    save(found, tmp_path / "result.json")
    assert load_result(tmp_path / "result.json").reasons == found.reasons


def test_fewer_bytes_than_hits_make_a_run_invalid(made: Any) -> None:
    few = made.result({"sgl_mc": made.stock}, read_bytes=int(0.9 * made.hits * 16384))
    assert few.reasons == ["sgl_mc: storage links carried 0.900 times the hit bytes (0.98 to 1.06)"]
    many = made.result({"sgl_mc": made.stock}, read_bytes=int(1.2 * made.hits * 16384))
    assert many.valid
    assert not all(check.holds for check in many.checks)


def test_systems_of_several_runs_are_not_called_interleaved(made: Any) -> None:
    stock, ours = made.result({"sgl_mc": made.stock}), made.result({"dualpath:split": made.ours})
    ours.versions["commit"] = "abc"
    joined = merge([stock, ours], workload_of(made.settings))
    assert joined.measured_apart
    assert joined.versions["commit of dualpath:split"] == "abc"
    assert "systems measured in runs of their own" in markdown(joined)
    assert merge([joined], workload_of(made.settings)).measured_apart
    together = made.result({"sgl_mc": made.stock, "dualpath:split": made.ours})
    assert "systems in turns" in markdown(together)


def test_the_default_prefetch_policy_may_lose_hits(made: Any) -> None:
    shown = made.result({"sgl_mc_default": made.stock}, hit_tokens=1000, failed=2)
    joined = merge([made.result({"sgl_mc": made.stock}), shown], workload_of(made.settings))
    assert joined.valid, joined.reasons


def test_results_of_other_settings_are_not_joined(made: Any) -> None:
    one = made.result({"sgl_mc": made.stock})
    made.settings = msgspec.structs.replace(made.settings, snic_mbit=400)
    with pytest.raises(ValueError, match="differ in snic_mbit"):
        merge([one, made.result({"dualpath:split": made.ours})], workload_of(made.settings))


def test_the_limit_of_a_system_is_that_of_the_links_it_may_read_through(result: Any) -> None:
    limits = result.throughput_limit_tokens_per_s
    assert limits["dualpath:split"] == pytest.approx(2 * limits["sgl_mc"])


def test_the_share_of_the_oracle_is_that_of_throughput(made: Any) -> None:
    result = made.result({"dualpath:split": made.ours, "oracle": [40.8] * 5})
    assert result.oracle_share["dualpath:split"] == pytest.approx(0.8)
    assert made.result({"dualpath:split": made.ours}).oracle_share["dualpath:split"] is None


def test_one_repetition_has_no_interval(made: Any) -> None:
    result = made.result({"sgl_mc": [100.0], "dualpath:split": [51.0]})
    assert result.ratios["dualpath:split/sgl_mc"].throughput_ci is None


@pytest.mark.parametrize("trace", [None, "nowhere.json"])
def test_a_result_is_judged_again_unless_its_trace_is_gone(
    result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trace: str | None
) -> None:
    monkeypatch.setattr("benchmarks.compare.plots.draw", lambda *_: ())
    changes = {"trace": trace} if trace else {}
    settings = msgspec.structs.replace(result.settings, **changes)
    save(msgspec.structs.replace(result, ratios={}, settings=settings), tmp_path / "r.json")
    done = CliRunner().invoke(app, ["--result", str(tmp_path / "r.json"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert ("stay as the run made them" in done.output) == bool(trace)
    assert set(load_result(tmp_path / "out" / "result.json").ratios) == (set() if trace else set(result.ratios))


def test_a_run_that_ended_early_stays_invalid(
    made: Any, result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.compare.plots.draw", lambda *_: ())
    ended = summarise(
        result.settings, workload_of(result.settings), result.repetitions,
        sustained={}, versions=result.versions, total_s=1.0, failure="The run ended early: no memory.",
    )  # fmt: skip
    assert not ended.valid
    save(ended, tmp_path / "r.json")
    done = CliRunner().invoke(app, ["--result", str(tmp_path / "r.json"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert load_result(tmp_path / "out" / "result.json").reasons == ended.reasons


def test_systems_that_met_the_same_arrivals_are_resampled_together(made: Any) -> None:
    waits = [40.0, 80.0, 60.0, 100.0, 20.0]
    found = made.result({"sgl_mc": waits, "dualpath:split": [value / 2 for value in waits]})
    assert found.ratios["dualpath:split/sgl_mc"].throughput_ci == pytest.approx((2.0, 2.0), rel=0.01)


def test_an_invalid_run_exits_with_1(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.compare.plots.draw", lambda *_: ())
    save(made.result({"sgl_mc": made.stock, "dualpath:split": made.ours}, failed=1), tmp_path / "r.json")
    done = CliRunner().invoke(app, ["--result", str(tmp_path / "r.json"), "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "invalid" in done.output


@pytest.mark.parametrize(
    "arguments",
    [["--preset", "none"], [], ["--preset", "pair", "--systems", "sgl"],
     ["--preset", "pair", "--trace", "nowhere.json"], ["--preset", "half_load", "--rounds", "2"],
     ["--preset", "pair", "--router", "http://x", "--server", "prefill"],
     ["--preset", "pair", "--router", "http://x"], ["--preset", "pair", "--kv-bytes", "4096"],
     ["--preset", "pair", "--contexts", "7000"], ["--preset", "pair", "--contexts", "8000-7000"],
     ["--preset", "half_load", "--systems", "dualpath:split", "--router", "http://x", "--server", "decode=http://x"],
     ["--preset", "pair", "--baseline", "nowhere.json"], ["--preset", "pair", "--merge", "nowhere.json"],
     ["--preset", "online", "--repetitions", "3"], ["--preset", "two_to_two", "--systems", "oracle"],
     ["--preset", "online", "--systems", "oracle"]],
)  # fmt: skip
def test_what_cannot_run_exits_with_2_and_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr("benchmarks.compare.runner.Turns.play", lambda *_, **__: pytest.fail("something was measured"))
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "compare: " in done.output


def test_what_a_deployment_is_can_be_said(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.compare.plots.draw", lambda *_: ())
    arguments = ["--preset", "pair", "--systems", "sgl_mc", "--router", server.url, "--repetitions", "2",
                 "--server", f"prefill={server.url}", "--server", f"decode={server.url}", "--agents", "2",
                 "--in-flight", "2", "--contexts", "300-400", "--page-tokens", "32", "--kv-bytes", "2048"]  # fmt: skip
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert "compare: " not in done.output
    settings = load_result(tmp_path / "result.json").settings
    assert (settings.snic_mbit, settings.cnic_mbit, settings.in_flight) == (None, None, 2)  # no rate that nobody said
    assert (settings.contexts, settings.page_tokens, settings.kv_bytes_per_token) == ((300, 400), 32, 2048)
    assert settings.deployed


def test_the_report_names_every_system_and_what_was_checked(result: Any) -> None:
    text = markdown(result, ("ttft.png",))
    assert "| sgl_mc |" in text
    assert "| dualpath:split / sgl_mc | 1.96 (" in text
    assert "- yes: sgl_mc: 0 requests failed" in text
    assert "(ttft.png)" in text


def test_the_report_compares_the_default_with_every_other_policy(made: Any) -> None:
    others = {f"dualpath:{name}": made.stock for name in ("prefill", "decode", "mine")}
    made.settings = msgspec.structs.replace(made.settings, systems=("sgl_mc", "dualpath:split", *others))
    text = markdown(made.result({"sgl_mc": made.stock, "dualpath:split": made.ours} | others))
    for name in others:
        assert f"| dualpath:split / {name} | 1.96 (" in text
        assert f"| {name} / sgl_mc | 1.00 (" in text


@pytest.mark.parametrize(
    ("preset", "says"),
    [("pair", "offline, at most 8 requests in flight"), ("half_load", "reads arrive at 50% of what"),
     ("online", "rates that are searched")],
)  # fmt: skip
def test_the_report_says_how_requests_came(made: Any, preset: str, says: str) -> None:
    made.settings = PRESETS[preset]
    assert says in markdown(made.result({"sgl_mc": made.stock}))


@pytest.mark.parametrize(
    ("cores", "says"), [([], "| 50% |"), ([0.98, 0.31], "| 98%, 31% |"), ([0.1] * 15 + [0.7], "| 50%, busiest 70% |")]
)
def test_the_report_has_every_core_of_a_small_machine(made: Any, cores: list[float], says: str) -> None:
    text = markdown(made.result({"sgl_mc": made.stock}, core_busy=cores))
    assert says in next(line for line in text.splitlines() if line.startswith("| sgl_mc |"))


def test_the_report_says_invalid_first(made: Any) -> None:
    text = markdown(made.result({"sgl_mc": made.stock}, failed=1))
    assert "**INVALID: sgl_mc: 5 requests failed" in text


def test_pictures_are_drawn_of_what_is_there(made: Any, result: Any, tmp_path: Path) -> None:
    assert draw(result, tmp_path) == ("nic_utilisation.png", "job_times.png", "read_time.png", "ttft.png")
    for name in ("nic_utilisation.png", "ttft.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    bare = made.result({"sgl_mc": [9.0]}, probe_bytes_per_s={}, records=[])
    assert draw(bare, tmp_path) == ("job_times.png",)


def test_a_sustained_rate_is_reported_and_drawn(result: Any, tmp_path: Path) -> None:
    trial = Trial(0.2, 0.95, True, result.measured["sgl_mc"], snic_busy={"prefill": 0.88})
    result.sustained = {"sgl_mc": Sustained(0.2, [trial])}
    assert "sustained_rate.png" in draw(result, tmp_path)
    # Every trial held, so the rate may be any higher.
    assert "| sgl_mc | at least 0.200 | 0.200: 95% | prefill 88% |" in markdown(result)
    trial.sustained = False
    assert "| sgl_mc | 0.200 | 0.200: 95% | - |" in markdown(result)
