"""A system's turn against servers that speak the protocol and have no model; systems and presets as they are built."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.compare import systems
from benchmarks.compare.presets import PRESETS
from benchmarks.compare.report import markdown
from benchmarks.compare.runner import Deployment, run, run_deployed, workload_of
from benchmarks.compare.schema import Settings, Slo
from benchmarks.compare.sustained import can_hold, judged, search, share_within
from benchmarks.compare.targets import TestbedTarget
from benchmarks.compare.turn import storage_readers
from benchmarks.load.measures import Record
from benchmarks.testbed import PAGE_TOKENS, Cluster, ClusterSpec, RequirementError

SMALL = msgspec.structs.replace(
    PRESETS["smoke"], systems=("dualpath:split",), agents=3, rounds=2, repetitions=2, contexts=(300, 400),
    longest_tokens=800, appended_tokens=70, namespaces=False, sample_s=0.05,
)  # fmt: skip


def deployment(server: Any) -> Deployment:
    return Deployment(server.url, {"prefill": server.url, "decode": server.url}, {"prefill/storage": "lo"}, 200)


def run_small(server: Any, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    monkeypatch.setattr("benchmarks.compare.watch._SETTLE_S", 0.0)
    settings = msgspec.structs.replace(SMALL, **changes)
    return run_deployed(settings, deployment(server), say=lambda _: None)


def test_a_turn_measures_every_round_of_every_agent(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_small(server, monkeypatch)
    workload = workload_of(SMALL)
    assert [len(repetition.records) for repetition in result.repetitions] == [6, 6]
    assert result.failed == {"dualpath:split": 0}
    assert result.hit_tokens["dualpath:split"] == workload.total_hit_tokens(PAGE_TOKENS)
    for repetition in result.repetitions:
        assert len(repetition.windows_s) == 2
        assert repetition.measured.jct_s == pytest.approx(sum(end - begin for begin, end in repetition.windows_s))
        second = [record for record in repetition.records if record.round == 1]
        assert all(record.sent_s >= repetition.windows_s[1][0] for record in second)


def test_misses_of_one_repetition_are_misses_of_the_next(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run_small(server, monkeypatch).repetitions
    assert first.hit_tokens == second.hit_tokens


def test_servers_own_counters_are_added_up_over_the_measured_part(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_small(server, monkeypatch)
    # Both servers of the deployment are the same process here, so each counted everything.
    assert result.read_amplification["dualpath:split"] == pytest.approx(2.0)
    assert not result.valid  # which the smoke preset takes for reading twice


def test_fallbacks_of_the_measured_part_are_reported(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_small(server, monkeypatch)
    # One for each of six requests, on either of two servers that are the same process; what was before does not count.
    assert [repetition.fallbacks for repetition in result.repetitions] == [{"lease_expired": 12}] * 2
    assert "Fallbacks of dualpath:split in all repetitions: lease_expired 24." in markdown(result)


def test_the_decode_server_s_own_time_between_tokens_is_that_of_the_measured_part(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_small(server, monkeypatch)
    assert [one.measured.itl_mean_s for one in result.repetitions] == pytest.approx([0.02, 0.02])


def test_caches_are_dropped_before_and_between_rounds(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_small(server, monkeypatch, repetitions=1)
    # Of two servers: after filling, after warming up, between two rounds, after the job.
    assert server.flushes == 2 * 4


def test_a_failing_request_is_counted_with_those_never_sent(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = server.change
    victims = {len(workload_of(SMALL).prompt_ids(0, 0, "0.0"))}
    server.change = lambda event: {"error": "lost"} if event["meta_info"]["prompt_tokens"] in victims else plain(event)
    monkeypatch.setattr("benchmarks.compare.turn.warm_up_agent", lambda workload: 1)
    result = run_small(server, monkeypatch, repetitions=1)
    assert result.failed == {"dualpath:split": 2}
    assert not result.valid


def test_poisson_reads_are_sent_at_a_share_of_the_links(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"mode": "poisson", "rounds": 1, "repetitions": 1, "passes": 3, "load": 1.0, "snic_mbit": 20_000}
    result = run_small(server, monkeypatch, **changes)
    assert len(result.repetitions[0].records) == 9


def test_a_sustained_rate_is_searched(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_small(server, monkeypatch, mode="online", rounds=1, repetitions=1, trial_steps=2, snic_mbit=20_000)
    found = result.sustained["dualpath:split"]
    assert [trial.sustained for trial in found.trials] == [True, True]
    assert found.agents_per_s == found.trials[1].agents_per_s > found.trials[0].agents_per_s


def test_trials_whose_contexts_were_in_memory_are_invalid(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_memory(event: dict[str, Any]) -> dict[str, Any]:
        cached = event["meta_info"]["cached_tokens"]
        event["meta_info"]["cached_tokens_details"] |= {"host": cached, "storage": 0}
        return event

    changes = {"mode": "online", "rounds": 1, "repetitions": 1, "trial_steps": 1, "snic_mbit": 20_000}
    assert run_small(server, monkeypatch, **changes).valid
    server.change = in_memory
    result = run_small(server, monkeypatch, **changes)
    assert result.reasons == ["dualpath:split: 0.0000 of the hit tokens came from storage"]


def test_every_wave_of_a_trial_begins_with_empty_caches(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"mode": "online", "rounds": 1, "repetitions": 1, "trial_steps": 2, "passes": 3, "snic_mbit": 20_000}
    result = run_small(server, monkeypatch, **changes)
    trials = result.sustained["dualpath:split"].trials
    assert [len(trial.records) for trial in trials] == [9, 9]
    # Of two servers: after filling, after warming up, before each wave, at the end.
    assert server.flushes == 2 * (2 + 2 * 3 + 1)
    for trial in trials:
        agents = [record.agent for record in sorted(trial.records, key=lambda record: record.sent_s)]
        assert [sorted(agents[wave : wave + 3]) for wave in (0, 3, 6)] == [[0, 1, 2]] * 3  # one after the other
        assert trial.fallbacks == {"lease_expired": 18}  # of nine requests on two servers that are one process
        assert trial.link_bytes["prefill/storage/rx"] > 0
        assert set(trial.snic_busy) == {"prefill"}
        tokens = sum(record.prompt_tokens + record.output_tokens for record in trial.records)
        assert trial.measured.throughput_tokens_per_s == pytest.approx(tokens / trial.measured.jct_s)
        assert trial.measured.jct_s < max(record.last_s for record in trial.records)


def test_no_rate_is_tried_above_what_the_links_of_a_system_carry(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"mode": "online", "rounds": 1, "repetitions": 1, "trial_steps": 1, "snic_mbit": 20_000}
    ours = run_small(server, monkeypatch, **changes).sustained["dualpath:split"].trials[0]
    stock = run_small(server, monkeypatch, systems=("sgl_mc",), **changes).sustained["sgl_mc"].trials[0]
    assert ours.agents_per_s == pytest.approx(2 * stock.agents_per_s)
    hits = workload_of(msgspec.structs.replace(SMALL, rounds=1)).total_hit_tokens(PAGE_TOKENS)
    assert stock.agents_per_s * hits / SMALL.agents * SMALL.kv_bytes_per_token == pytest.approx(20e9 / 8 / 2)


def test_the_base_of_read_times_is_a_median(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_small(server, monkeypatch, repetitions=1)
    assert result.repetitions[0].base_ttft_s is None  # the fake server has everything from storage

    def in_memory(event: dict[str, Any]) -> dict[str, Any]:
        event["meta_info"]["cached_tokens_details"]["storage"] = 0
        return event

    server.change = in_memory
    assert run_small(server, monkeypatch, repetitions=1).repetitions[0].base_ttft_s > 0


def test_dead_runs_are_cleaned_up_before_memory_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr("benchmarks.compare.runner.clean_up_dead_runs", lambda: done.append("cleaned"))
    monkeypatch.setattr("benchmarks.compare.runner.available_bytes", lambda: done.append("counted") or 0)
    settings = msgspec.structs.replace(PRESETS["smoke"], namespaces=False)
    with pytest.raises(RequirementError, match="memory"):
        run(settings, out=tmp_path, say=lambda _: None)
    assert done == ["cleaned", "counted"]


@pytest.mark.parametrize(
    ("devices", "says"),
    [({"prefill/storage": "gone0"}, "no device 'gone0' for prefill/storage"), ({"other/storage": "lo"}, "no link")],
)
def test_a_device_that_is_not_there_is_refused(server: Any, devices: dict[str, str], says: str) -> None:
    settings = msgspec.structs.replace(SMALL, repetitions=1)
    servers = {"prefill": server.url, "decode": server.url}
    with pytest.raises(RequirementError, match=says):
        run_deployed(settings, Deployment(server.url, servers, devices), say=lambda _: None)


@pytest.mark.parametrize("names", [("prefill",), ("prefill", "decode2"), ("prefill1", "decode"), ("p0", "d0")])
def test_servers_of_a_deployment_go_by_the_names_that_a_report_uses(server: Any, names: tuple[str, ...]) -> None:
    servers = dict.fromkeys(names, server.url)
    with pytest.raises(RequirementError, match="named prefill, or prefill1"):
        run_deployed(SMALL, Deployment(server.url, servers, {}), say=lambda _: None)


def test_a_deployment_has_as_many_servers_as_are_named(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.compare.watch._SETTLE_S", 0.0)
    servers = dict.fromkeys(("prefill", "decode1", "decode2", "decode3"), server.url)
    settings = msgspec.structs.replace(SMALL, repetitions=1)
    result = run_deployed(settings, Deployment(server.url, servers, {}), say=lambda _: None)
    assert (result.settings.prefill_servers, result.settings.decode_servers) == (1, 3)


def answered(ttft_s: float) -> Record:
    return Record(0, 0, 0.0, ttft_s, ttft_s + 0.1, ttft_s + 0.2, prompt_tokens=1, output_tokens=3)


def test_bisection_ends_below_the_true_rate_by_at_most_its_last_step() -> None:
    slo = Slo(ttft_s=5.0)
    found = search(lambda rate, _: judged(rate, [answered(1.0 if rate <= 0.7 else 99.0)], slo), highest_per_s=1.6,
                   steps=6)  # fmt: skip
    assert 0.7 - 1.6 / 2**6 <= found.agents_per_s <= 0.7
    assert len(found.trials) == 6


def test_a_failed_request_keeps_no_objective() -> None:
    lost = Record(0, 0, 0.0, error="lost")
    assert share_within([answered(1.0), lost, answered(9.0), answered(1.0)], Slo(ttft_s=5.0)) == 0.5
    assert share_within([], Slo()) == 0.0


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.sampled_from([0.5, 0.9, 0.99, 1.0]), st.data())
def test_a_trial_is_ended_early_exactly_when_no_rest_of_it_could_hold(
    kept: list[bool], share: float, data: st.DataObject
) -> None:
    slo = Slo(ttft_s=5.0, share=share)
    played = data.draw(st.integers(0, len(kept)))
    records = [answered(1.0 if one else 9.0) for one in kept]
    best = records[:played] + [answered(1.0)] * (len(kept) - played)
    assert can_hold(records[:played], len(kept), slo) == judged(1.0, best, slo).sustained
    if not can_hold(records[:played], len(kept), slo):
        assert not judged(1.0, records, slo).sustained
        assert not judged(1.0, records[:played], slo).sustained


def test_a_trial_that_cannot_hold_any_more_plays_no_more_waves(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    never = {"mode": "online", "rounds": 1, "repetitions": 1, "trial_steps": 2, "passes": 3, "snic_mbit": 20_000}
    result = run_small(server, monkeypatch, **never, slo=Slo(ttft_s=0.0))
    found = result.sustained["dualpath:split"]
    assert [len(trial.records) for trial in found.trials] == [3, 3]
    assert (found.agents_per_s, [trial.sustained for trial in found.trials]) == (0.0, [False, False])
    assert "2 trials of each system, each of up to 3 waves of agents." in markdown(result)


def spec_of(system: str, **changes: Any) -> ClusterSpec:
    settings = msgspec.structs.replace(PRESETS["pair"], **changes)
    return systems.cluster_spec(system, settings, workload_of(settings), Path("model"))


@pytest.mark.parametrize(
    ("system", "servers"),
    [("sgl_mc", ["prefill"]), ("dualpath:prefill", ["prefill"]), ("dualpath:decode+lease=2", ["decode"]),
     ("dualpath:split", ["prefill", "decode"]), ("oracle", [])],
)  # fmt: skip
def test_a_system_reads_through_the_links_of_its_readers(system: str, servers: list[str]) -> None:
    assert storage_readers(system, PRESETS["pair"]) == servers


def test_systems_differ_in_what_their_name_says_and_in_nothing_else() -> None:
    plain, both, ours = spec_of("sgl_mc"), spec_of("sgl_mc_both"), spec_of("dualpath:split")
    assert plain.servers[0] == both.servers[0]
    assert [server.hicache for server in plain.servers] == [True, False]
    assert [server.hicache for server in both.servers] == [True, True]
    for mine, theirs in zip(ours.servers, both.servers, strict=True):
        assert mine.extra_flags == ("--dualpath-policy", "split")
        assert msgspec_free(mine) == msgspec_free(theirs)
    assert plain.network == ours.network
    assert plain.store == ours.store


def msgspec_free(server: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(server).items() if name not in {"kv_connector", "extra_flags"}}


def test_a_flag_of_dualpath_can_be_added_to_a_system() -> None:
    tuned = spec_of("dualpath:split+reader-threads=2+lease=0.5")
    flags = ("--dualpath-policy", "split", "--dualpath-reader-threads", "2", "--dualpath-lease", "0.5")
    assert {server.extra_flags for server in tuned.servers} == {flags}


def test_the_oracle_s_device_pool_holds_every_prompt() -> None:
    workload = workload_of(PRESETS["pair"])
    longest = sum(trajectory.rounds[-1].prompt_tokens for trajectory in workload.trajectories)
    assert spec_of("oracle").servers[0].max_total_tokens > longest
    assert spec_of("oracle").servers[1] == spec_of("sgl_mc").servers[1]


def test_servers_are_numbered_when_there_are_several() -> None:
    assert [server.label for server in spec_of("sgl_mc", decode_servers=2).servers] == ["prefill", "decode1", "decode2"]


@pytest.mark.parametrize("names", [(), ("sgl_mc", "sgl_mc"), ("dualpath:",), ("other",), ("dualpath:split+lease",)])
def test_unknown_systems_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(systems.UnknownSystemError):
        systems.check_systems(msgspec.structs.replace(PRESETS["pair"], systems=names))


@pytest.mark.parametrize("settings", PRESETS.values(), ids=PRESETS)
def test_every_preset_fits_into_the_memory_it_was_made_for(settings: Settings) -> None:
    workload = workload_of(settings)
    specs = {system: systems.cluster_spec(system, settings, workload, Path("model")) for system in settings.systems}
    assert sum(systems.memory_budget(settings, specs).values()) < 23.7e9
    systems.check_systems(settings)


@pytest.mark.parametrize("name", ["pair", "one_to_two", "two_to_two", "half_load", "policies"])
def test_presets_of_the_fixed_setting_keep_to_it(name: str) -> None:
    settings = PRESETS[name]
    assert (settings.snic_mbit, settings.cnic_mbit, settings.in_flight_per_prefill) == (200, 1600, 8)
    prompts = [round_.prompt_tokens for one in workload_of(settings).trajectories for round_ in one.rounds]
    assert 6000 <= min(prompts) <= max(prompts) <= 8000


@pytest.mark.parametrize("name", ["pair", "unbound", "policies", "one_to_two", "two_to_two"])
def test_stock_s_prefetch_window_holds_what_is_in_flight(name: str) -> None:
    settings = PRESETS[name]
    window = settings.pools.prefill_tokens * settings.pools.prefill_ratio / 2
    longest = max(round_.prompt_tokens for one in workload_of(settings).trajectories for round_ in one.rounds)
    # A prefetch is let in while less than the window is taken.
    assert window > (settings.in_flight_per_prefill - 1) * longest


def test_a_suspended_cluster_starts_nothing_until_it_is_resumed(tmp_path: Path) -> None:
    spec = ClusterSpec(model=tmp_path, servers=(), store=None, router=None)
    with Cluster(spec, log_dir=tmp_path, say=lambda _: None, suspended=True) as cluster:
        assert not cluster.running
        cluster.resume()
        assert cluster.running
        cluster.suspend()
        cluster.suspend()
        assert not cluster.running
        assert cluster.process_groups() == {}


def test_logs_of_every_turn_are_kept(tmp_path: Path) -> None:
    spec = ClusterSpec(model=tmp_path, servers=(), store=None, router=None)
    with Cluster(spec, log_dir=tmp_path, say=lambda _: None, suspended=True) as cluster:
        target = TestbedTarget(cluster)
        for turn in ("first", "second"):
            target.resume()
            (tmp_path / "router.log").write_text(turn)
            target.suspend()
    assert [(tmp_path / f"turn{number}" / "router.log").read_text() for number in (1, 2)] == ["first", "second"]


def test_links_are_removed_although_a_process_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never_ends() -> None:
        raise subprocess.TimeoutExpired("server", 10.0)

    spec = ClusterSpec(model=tmp_path, servers=(), store=None, router=None)
    cluster = Cluster(spec, log_dir=tmp_path, suspended=True)
    cluster.__enter__()
    removed: list[str] = []
    cluster.network = SimpleNamespace(close=lambda: removed.append("links"))  # type: ignore[assignment]
    with monkeypatch.context() as patched:
        patched.setattr(cluster._processes, "close", never_ends)
        with pytest.raises(subprocess.TimeoutExpired):
            cluster.close()
    assert removed == ["links"]
    cluster.close()


def test_two_clusters_of_one_process_have_records_of_their_own(tmp_path: Path) -> None:
    spec = ClusterSpec(model=tmp_path, servers=(), store=None, router=None)
    with Cluster(spec, log_dir=tmp_path, suspended=True) as one, Cluster(spec, log_dir=tmp_path, suspended=True) as two:
        assert one._state.path != two._state.path
        assert one._state.path.exists()
    assert not two._state.path.exists()


def test_what_was_measured_before_servers_failed_is_kept_as_invalid(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = server.flushes

    def fail_later(event: dict[str, Any]) -> dict[str, Any]:
        # The second repetition's requests that warm servers up come after the first one's four flushes of two servers.
        return {"error": "gone"} if server.flushes - flush >= 8 else event

    server.change = fail_later
    result = run_small(server, monkeypatch)
    assert [repetition.number for repetition in result.repetitions] == [0]
    assert any("ended early, in repetition 2 of dualpath:split" in reason for reason in result.reasons)
