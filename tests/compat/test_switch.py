"""The one flag: where it is taken, what it installs, what it hands to child processes, and which defaults it sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_dualpath.config import FLAGS
from tests.compat.conftest import Argv
from tests.compat.forks import PATCHED, ForkServer

# The first test of a run waits for the process that imports SGLang, on a machine that may be in use.
pytestmark = pytest.mark.timeout(420)


ENGINE = {"device": "cpu", "dtype": "float32", "page_size": 64, "hicache_storage_backend": "file"}
FLAG_HOOKS = [
    "sglang.srt.server_args.ServerArgs.add_cli_args",
    "sglang.srt.server_args.ServerArgs.from_cli_args",
]
OTHER_HOOKS = [
    "sglang.srt.disaggregation.decode.DecodePreallocQueue",
    "sglang.srt.disaggregation.decode.DecodeTransferQueue",
    # Natively registered where the patches are applied.
    *([] if PATCHED else ["sglang.srt.disaggregation.utils.get_kv_class"]),
    "sglang.srt.managers.scheduler.Scheduler",
    "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController",
]
# Whatever reads the flag imports; none of it imports SGLang's engine.
WITHOUT_FLAG = {"config", "errors", "plugin", "policy", "protocol"}


def parts(report: dict[str, Any]) -> set[str]:
    """Parts of the package that a process has imported."""
    return {name.split(".")[1] for name in report["modules"] if "." in name}


# -- on and off --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["python", "serve"])
def test_without_the_flag_exactly_the_two_hooks_that_add_and_read_it_are_installed(
    forks: ForkServer, argv: Argv, shell: str
) -> None:
    outcome = forks.run("launch_server", argv("prefill", switch=False), shell)
    assert outcome.code == 0, outcome.stderr
    assert outcome.report["hooks"] == outcome.report["patched"] == FLAG_HOOKS
    assert outcome.report["environ"] == {}


def test_without_the_flag_nothing_that_hooks_into_the_engine_is_imported(forks: ForkServer, argv: Argv) -> None:
    outcome = forks.run("launch_server", argv("prefill", switch=False))
    assert parts(outcome.report) == WITHOUT_FLAG


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("store", ["file", "mooncake"])
def test_sglang_decides_how_processes_share_metrics(forks: ForkServer, argv: Argv, mode: str, store: str) -> None:
    # It does when it starts its processes; prometheus_client does not ask again.
    flags = argv(mode, "--enable-metrics", storage=store)
    outcome = forks.run("launch_server", flags, env={"MOONCAKE_MASTER": "127.0.0.1:1"})
    assert outcome.code == 0, outcome.stderr
    assert not outcome.report["prometheus"]


@pytest.mark.parametrize("shell", ["python", "serve"])
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_with_the_flag_every_hook_is_applied(forks: ForkServer, argv: Argv, shell: str, mode: str) -> None:
    outcome = forks.run("launch_server", argv(mode), shell)
    assert outcome.code == 0, outcome.stderr
    assert outcome.report["hooks"] == outcome.report["patched"] == sorted(FLAG_HOOKS + OTHER_HOOKS)
    assert outcome.report["arguments"]["radix_cache_backend"] == "'dualpath'"


def test_help_lists_the_flags(forks: ForkServer) -> None:
    outcome = forks.run("launch_server", ["--help"])
    assert outcome.code == 0, outcome.stderr
    assert "--kv-connector {dualpath}" in outcome.stdout
    for flag in FLAGS:
        assert flag.option in outcome.stdout


def test_the_flag_may_come_from_a_config_file(forks: ForkServer, argv: Argv, tmp_path: Path) -> None:
    settings = tmp_path / "server.yaml"
    settings.write_text("kv-connector: dualpath\ndualpath-lease: 0.5\n")
    outcome = forks.run("launch_server", argv("prefill", "--config", str(settings), switch=False))
    assert outcome.code == 0, outcome.stderr
    assert outcome.report["environ"] == {"SGLANG_KV_CONNECTOR": "dualpath", "SGLANG_DUALPATH_LEASE": "0.5"}


def test_an_engine_is_switched_on_by_the_environment(forks: ForkServer, model: Path) -> None:
    arguments = {"model_path": str(model), "disaggregation_mode": "prefill", **ENGINE}
    outcome = forks.run("engine", arguments, env={"SGLANG_KV_CONNECTOR": "dualpath"})
    assert outcome.code == 0, outcome.stderr
    assert outcome.report["patched"] == sorted(FLAG_HOOKS + OTHER_HOOKS)
    assert outcome.report["arguments"]["radix_cache_backend"] == "'dualpath'"


def test_an_engine_without_the_environment_is_stock(forks: ForkServer, model: Path) -> None:
    arguments = {"model_path": str(model), "disaggregation_mode": "prefill", **ENGINE}
    outcome = forks.run("engine", arguments, env={"SGLANG_DUALPATH_LEASE": "0.5"})
    assert outcome.code == 0, outcome.stderr
    assert outcome.report["hooks"] == FLAG_HOOKS
    assert outcome.report["arguments"]["radix_cache_backend"] == "None"


def test_a_refusal_ends_an_engine_too(forks: ForkServer, model: Path) -> None:
    arguments = {"model_path": str(model), "disaggregation_mode": "prefill", "pp_size": 2, **ENGINE}
    outcome = forks.run("engine", arguments, env={"SGLANG_KV_CONNECTOR": "dualpath"})
    assert "--pp-size 2" in outcome.sentence


# -- child processes ---------------------------------------------------------------------------------------------------


def test_a_child_finds_the_switch_and_every_hook(forks: ForkServer, argv: Argv) -> None:
    parent = forks.run("launch_server", argv("decode"))
    child = forks.run("child", env=parent.report["environ"])
    assert child.code == 0, child.stderr
    assert child.report["patched"] == sorted(FLAG_HOOKS + OTHER_HOOKS)


def test_a_child_of_a_stock_server_is_stock(forks: ForkServer, argv: Argv) -> None:
    parent = forks.run("launch_server", argv("decode", switch=False))
    child = forks.run("child", env=parent.report["environ"])
    assert child.report["hooks"] == FLAG_HOOKS


def test_a_child_has_the_settings_of_the_command_line(forks: ForkServer, argv: Argv) -> None:
    flags = ("--dualpath-policy", "prefill", "--dualpath-lease", "0.25", "--dualpath-chunk-bytes", "2MiB")
    parent = forks.run("launch_server", argv("prefill", *flags))
    settings = forks.run("config", env=parent.report["environ"]).report
    assert (settings["policy"], settings["lease_s"], settings["chunk_bytes"]) == ("prefill", 0.25, 2 << 20)


def test_a_flag_at_its_default_overrules_the_environment_in_children_too(forks: ForkServer, argv: Argv) -> None:
    stray = {"SGLANG_DUALPATH_LEASE": "7", "SGLANG_DUALPATH_READER_THREADS": "3"}
    parent = forks.run("launch_server", argv("prefill", "--dualpath-lease", "1.0"), env=stray)
    assert parent.report["environ"] == {"SGLANG_KV_CONNECTOR": "dualpath", "SGLANG_DUALPATH_READER_THREADS": "3"}


def test_every_setting_has_a_flag_and_an_environment_twin(forks: ForkServer, argv: Argv, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("0123456789abcdef0123")
    special = {"policy": "decode", "host": "127.0.0.1", "key-file": str(key), "host-memory": "1.5", "lease": "0.5"}
    values = {flag: special.get(flag.name, "32MiB" if flag.name.endswith("bytes") else "7") for flag in FLAGS}
    line = argv("prefill", *(part for flag, value in values.items() for part in (flag.option, value)))
    by_flags = forks.run("launch_server", line)
    assert by_flags.code == 0, by_flags.stderr
    from_flags = forks.run("config", env=by_flags.report["environ"]).report
    twins = {flag.env: value for flag, value in values.items()}
    assert from_flags == forks.run("config", env={"SGLANG_KV_CONNECTOR": "dualpath", **twins}).report
    default = forks.run("config", env={"SGLANG_KV_CONNECTOR": "dualpath"}).report
    assert [name for name in default if default[name] == from_flags[name]] == []


# -- what is wrong with the flag itself --------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["python", "serve"])
def test_a_wrong_policy_name_lists_the_known_ones(forks: ForkServer, argv: Argv, shell: str) -> None:
    sentence = forks.run("launch_server", argv("prefill", "--dualpath-policy", "fastest"), shell).sentence
    assert "--dualpath-policy" in sentence
    assert "'fastest'" in sentence
    for name in ("prefill", "decode", "shorter_queue", "split"):
        assert name in sentence


def test_a_tuning_flag_without_the_switch_is_refused(forks: ForkServer, argv: Argv) -> None:
    sentence = forks.run("launch_server", argv("prefill", "--dualpath-lease", "0.5", switch=False)).sentence
    assert sentence == "--dualpath-lease needs --kv-connector dualpath beside it."


def test_another_connector_is_refused(forks: ForkServer, argv: Argv) -> None:
    sentence = forks.run("launch_server", argv("prefill", "--kv-connector", "other", switch=False)).sentence
    assert sentence == "--kv-connector must be dualpath, the only connector there is, not 'other'."


def test_a_wrong_value_in_the_environment_names_the_variable(forks: ForkServer) -> None:
    environ = {"SGLANG_KV_CONNECTOR": "dualpath", "SGLANG_DUALPATH_LEASE": "soon"}
    assert forks.run("child", env=environ).sentence.startswith("SGLANG_DUALPATH_LEASE must be a number")


def test_a_key_file_that_is_not_there_is_refused(forks: ForkServer, argv: Argv, tmp_path: Path) -> None:
    sentence = forks.run("launch_server", argv("prefill", "--dualpath-key-file", str(tmp_path / "none"))).sentence
    assert "--dualpath-key-file" in sentence
    assert "cannot be read" in sentence


# -- defaults ----------------------------------------------------------------------------------------------------------


def changed(forks: ForkServer, argv: Argv, mode: str, *flags: str) -> dict[str, str]:
    """Resolved arguments that differ from those of a stock server with the same command line."""
    stock = forks.run("launch_server", argv(mode, *flags, switch=False))
    ours = forks.run("launch_server", argv(mode, *flags))
    assert stock.code == ours.code == 0, stock.stderr + ours.stderr
    before, after = stock.report["arguments"], ours.report["arguments"]
    per_run = {"random_seed", "nccl_port", "crash_dump_folder"}
    return {name: value for name, value in after.items() if value != before[name] and name not in per_run}


def test_a_prefill_server_gets_the_host_cache_and_waits_for_its_reads(forks: ForkServer, argv: Argv) -> None:
    assert changed(forks, argv, "prefill") == {
        "enable_hierarchical_cache": "True",
        "radix_cache_backend": "'dualpath'",
        "hicache_storage_prefetch_policy": "'wait_complete'",
    }


def test_a_decode_server_gets_its_radix_cache_and_a_host_pool_too(forks: ForkServer, argv: Argv) -> None:
    assert changed(forks, argv, "decode") == {
        "enable_hierarchical_cache": "True",
        "radix_cache_backend": "'dualpath'",
        "hicache_storage_prefetch_policy": "'wait_complete'",
        "disaggregation_decode_enable_radix_cache": "True",
        "disable_radix_cache": "False",
        "hicache_ratio": "2.0",
    }


def test_what_is_set_already_stays(forks: ForkServer, argv: Argv) -> None:
    flags = (
        "--enable-hierarchical-cache",
        "--hicache-storage-prefetch-policy",
        "wait_complete",
        "--hicache-ratio",
        "3",
    )
    assert changed(forks, argv, "prefill", *flags) == {"radix_cache_backend": "'dualpath'"}
    flags += ("--disaggregation-decode-enable-radix-cache",)
    assert changed(forks, argv, "decode", *flags) == {"radix_cache_backend": "'dualpath'"}


@pytest.mark.parametrize("size", [("--hicache-ratio", "0.5"), ("--hicache-size", "1")])
def test_a_given_host_pool_size_is_left_alone(forks: ForkServer, argv: Argv, size: tuple[str, str]) -> None:
    assert "hicache_ratio" not in changed(forks, argv, "decode", *size)


def test_the_default_host_pool_size_is_tunable_and_still_fitted_to_the_machine(forks: ForkServer, argv: Argv) -> None:
    flags = ("--hicache-host-memory-fraction", "0.3")
    ours = forks.run("launch_server", argv("decode", "--dualpath-host-memory", "1.25", *flags))
    assert ours.report["arguments"]["hicache_ratio"] == "1.25"
    # SGLang reduces a default until the pools fit, unless this is None.
    assert ours.report["arguments"]["hicache_host_memory_fraction"] == "0.3"


def test_what_is_overridden_is_logged(forks: ForkServer, argv: Argv) -> None:
    log = forks.run("launch_server", argv("decode")).stderr
    assert "sets --hicache-storage-prefetch-policy wait_complete (was timeout)" in log
    assert "host pool is 2 times its device pool" in log


def test_what_is_not_overridden_is_not_logged(forks: ForkServer, argv: Argv) -> None:
    flags = ("--hicache-storage-prefetch-policy", "wait_complete", "--hicache-ratio", "1")
    log = forks.run("launch_server", argv("decode", *flags)).stderr
    assert "--kv-connector dualpath sets" not in log
    assert "host pool is" not in log


@pytest.mark.parametrize("backend", ["mooncake", "mooncake_tcp", "nixl"])
def test_the_transfer_backend_stays_as_given(forks: ForkServer, argv: Argv, backend: str) -> None:
    assert "disaggregation_transfer_backend" not in changed(
        forks, argv, "prefill", "--disaggregation-transfer-backend", backend
    )


# -- warnings ----------------------------------------------------------------------------------------------------------

MASTER = {"master_server_address": "127.0.0.1:50051", "metadata_server": "P2PHANDSHAKE"}


def mooncake_log(forks: ForkServer, argv: Argv, settings: dict[str, Any], *flags: str, env: Any = None) -> str:
    extra = ("--hicache-storage-backend-extra-config", json.dumps(MASTER | settings), *flags)
    outcome = forks.run("launch_server", argv("prefill", *extra, storage="mooncake"), env=env)
    assert outcome.code == 0, outcome.stderr
    return outcome.stderr


def test_a_server_that_lends_memory_to_the_store_is_warned(forks: ForkServer, argv: Argv) -> None:
    assert "lends host memory to the store" in mooncake_log(forks, argv, {"global_segment_size": "4gb"})


def test_a_store_that_keeps_pages_on_disk_is_warned_of(forks: ForkServer, argv: Argv) -> None:
    settings = {"global_segment_size": 0, "enable_ssd_offload": True, "ssd_offload_path": "/ssd"}
    assert "ssd_offload_path of their own" in mooncake_log(forks, argv, settings)


def test_a_server_that_lends_none_is_not_warned(forks: ForkServer, argv: Argv) -> None:
    log = mooncake_log(forks, argv, {"global_segment_size": 0, "protocol": "tcp"})
    assert "lends host memory" not in log
    assert "share a NIC" not in log


def test_store_and_hop_on_one_rdma_device_are_warned_of(forks: ForkServer, argv: Argv) -> None:
    settings = {"global_segment_size": 0, "protocol": "rdma"}
    log = mooncake_log(forks, argv, settings, env={"MC_FORCE_TCP": "0"})
    assert "The store's transfers and the hop share a NIC (chosen from all)" in log


def test_without_rdma_nothing_is_said_of_devices(forks: ForkServer, argv: Argv) -> None:
    log = mooncake_log(forks, argv, {"global_segment_size": 0, "protocol": "rdma"}, env={"MC_FORCE_TCP": "1"})
    assert "share a NIC" not in log


def test_store_settings_in_the_environment_are_looked_at(forks: ForkServer, argv: Argv) -> None:
    env = {"MOONCAKE_MASTER": "127.0.0.1:50051", "MOONCAKE_GLOBAL_SEGMENT_SIZE": "4gb"}
    log = forks.run("launch_server", argv("prefill", storage="mooncake"), env=env).stderr
    assert "lends host memory to the store" in log


def test_store_settings_in_a_file_are_looked_at(forks: ForkServer, argv: Argv, tmp_path: Path) -> None:
    settings = tmp_path / "store.json"
    settings.write_text(json.dumps(MASTER | {"global_segment_size": 1}))
    extra = ("--hicache-storage-backend-extra-config", f"@{settings}")
    assert "lends host memory" in forks.run("launch_server", argv("prefill", *extra, storage="mooncake")).stderr


def test_store_settings_that_are_missing_are_left_to_the_store(forks: ForkServer, argv: Argv) -> None:
    outcome = forks.run("launch_server", argv("prefill", storage="mooncake"))
    assert outcome.code == 0, outcome.stderr
