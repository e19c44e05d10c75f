"""What servers and routers are started with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.testbed.model import kv_bytes_per_token
from benchmarks.testbed.network import Node, tbf_arguments
from benchmarks.testbed.processes import clean_environment
from benchmarks.testbed.router import router_command
from benchmarks.testbed.servers import (
    Place,
    ServerSpec,
    dualpath_pair,
    server_command,
    server_environment,
    stock_pair,
)
from benchmarks.testbed.store import Store, mooncake_master_command

PREFILL = Place("ns-prefill", "10.193.0.1", "10.192.0.1", 20001, 20002)
DECODE = Place("ns-decode", "10.193.0.2", "10.192.0.2", 20003, 20004)
DIRECT = ("direct", "page_first_direct")
KERNEL = ("kernel", "page_first")
STORE = Store(("--hicache-storage-backend", "file"), {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": "/store"})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = {"dtype": "float32", "num_hidden_layers": 4, "num_key_value_heads": 8, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def flag(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_a_server_binds_its_compute_address_and_runs_the_model_in_its_own_type(model: Path) -> None:
    command = server_command(ServerSpec(role="prefill"), PREFILL, STORE, model)
    assert flag(command, "--host") == "10.193.0.1"
    assert flag(command, "--dtype") == "float32"
    assert flag(command, "--disaggregation-bootstrap-port") == "20002"


def test_the_store_client_binds_the_storage_address(model: Path) -> None:
    environment = server_environment(ServerSpec(role="decode"), DECODE, STORE, {})
    assert environment["MOONCAKE_LOCAL_HOSTNAME"] == "10.192.0.2"
    assert environment["SGLANG_HOST_IP"] == "10.193.0.2"
    assert environment["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] == "/store"


@pytest.mark.parametrize("connector", [None, "dualpath"])
def test_no_server_closes_a_connection_that_the_router_may_use_again(connector: str | None) -> None:
    spec = ServerSpec(role="prefill", kv_connector=connector)
    assert int(server_environment(spec, PREFILL, STORE, {})["SGLANG_TIMEOUT_KEEP_ALIVE"]) >= 3600


def test_a_cpu_server_schedules_without_overlap_and_copies_pages_directly(model: Path) -> None:
    command = server_command(ServerSpec(role="prefill"), PREFILL, STORE, model)
    assert flag(command, "--device") == "cpu"
    assert {"--disable-overlap-schedule", "--sleep-on-idle"} <= set(command)
    assert (flag(command, "--hicache-io-backend"), flag(command, "--hicache-mem-layout")) == DIRECT
    environment = server_environment(ServerSpec(role="prefill"), PREFILL, STORE, {})
    assert environment["SGLANG_PLATFORM"] == "dualpath_cpu"
    assert environment["OMP_NUM_THREADS"] == environment["TORCHDYNAMO_DISABLE"] == "1"


@pytest.mark.parametrize("hicache", [True, False])
def test_a_cuda_server_schedules_with_overlap_and_copies_pages_by_kernels(model: Path, hicache: bool) -> None:
    spec = ServerSpec(role="decode", device="cuda", kv_connector="dualpath", hicache=hicache)
    command = server_command(spec, DECODE, STORE, model)
    assert flag(command, "--device") == "cuda"
    assert not {"--disable-overlap-schedule", "--sleep-on-idle"} & set(command)
    assert (flag(command, "--hicache-io-backend"), flag(command, "--hicache-mem-layout")) == KERNEL


def test_outputs_of_a_cuda_server_do_not_depend_on_what_is_cached(model: Path) -> None:
    command = server_command(ServerSpec(role="prefill", device="cuda"), PREFILL, STORE, model)
    assert "--enable-deterministic-inference" in command
    assert flag(command, "--attention-backend") == "triton"
    assert "--mem-fraction-static" not in command
    assert int(flag(command, "--max-total-tokens")) > 0


def test_a_cuda_server_has_nothing_of_the_cpu_platform_in_its_environment() -> None:
    spec = ServerSpec(role="prefill", device="cuda", transfer_backend="nixl", tp_size=2)
    base = {"CUDA_VISIBLE_DEVICES": "1", "SGLANG_PLATFORM": "dualpath_cpu", "UCX_TLS": "tcp"}
    environment = server_environment(spec, PREFILL, STORE, base)
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    cpu_only = {"OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE", "UCX_TLS", "UCX_NET_DEVICES"}
    assert not cpu_only & set(environment)
    assert not [name for name in environment if "PLATFORM" in name or "SGLANG_CPU" in name]


@pytest.mark.parametrize(
    ("place", "device"), [(PREFILL, "compute"), (Place(None, "127.0.0.1", "127.0.0.1", 20001, 20002), "lo")]
)
def test_nixl_stays_on_the_compute_network(model: Path, place: Place, device: str) -> None:
    spec = ServerSpec(role="prefill", transfer_backend="nixl")
    assert flag(server_command(spec, place, STORE, model), "--disaggregation-transfer-backend") == "nixl"
    environment = server_environment(spec, place, STORE, {"UCX_TLS": "all", "NIXL_LOG_LEVEL": "TRACE"})
    assert (environment["UCX_TLS"], environment["UCX_NET_DEVICES"]) == ("tcp", device)
    assert "UCX_TLS" not in server_environment(ServerSpec(role="prefill"), place, STORE, {"UCX_TLS": "all"})


def test_the_dualpath_pair_is_the_stock_pair_plus_one_flag(model: Path) -> None:
    places = (PREFILL, DECODE)
    for ours, stock, place in zip(dualpath_pair(), stock_pair(decode_hicache=True), places, strict=True):
        with_flag = server_command(ours, place, STORE, model)
        without = server_command(stock, place, STORE, model)
        assert with_flag == [*without, "--kv-connector", "dualpath"]


def test_a_server_of_several_ranks_is_told_how_many_and_where(model: Path) -> None:
    spec = ServerSpec(role="prefill", tp_size=2, dp_size=2)
    command = server_command(spec, PREFILL, STORE, model)
    assert flag(command, "--tp-size") == flag(command, "--dp-size") == "2"
    cores = server_environment(spec, PREFILL, STORE, {})["SGLANG_CPU_OMP_THREADS_BIND"].split("|")
    assert len(cores) == 4
    assert all(core.isdigit() for core in cores)


def test_a_server_of_one_rank_has_the_command_line_of_one(model: Path) -> None:
    command = server_command(ServerSpec(role="prefill"), PREFILL, STORE, model)
    assert not {"--tp-size", "--dp-size"} & set(command)
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in server_environment(ServerSpec(role="prefill"), PREFILL, STORE, {})


def test_every_rank_takes_memory() -> None:
    one, two = (ServerSpec(role="prefill", tp_size=size).memory_bytes(16_384) for size in (1, 2))
    assert two > one + 24_000 * 16_384


def test_a_decode_server_without_hicache_has_no_storage(model: Path) -> None:
    _, decode = stock_pair(decode_hicache=False)
    command = server_command(decode, DECODE, STORE, model)
    assert not any("hicache" in word or "radix" in word for word in command)


def test_extra_flags_come_last_and_extra_environment_wins(model: Path) -> None:
    spec = ServerSpec(role="prefill", extra_flags=("--page-size", "32"), extra_env={"OMP_NUM_THREADS": "2"})
    assert server_command(spec, PREFILL, STORE, model)[-2:] == ["--page-size", "32"]
    assert server_environment(spec, PREFILL, STORE, {})["OMP_NUM_THREADS"] == "2"


def test_proxies_and_settings_of_other_runs_do_not_reach_a_server() -> None:
    base = {"HTTPS_PROXY": "http://x", "SGLANG_PLATFORM": "other", "MC_X": "1", "PATH": "/bin"}
    environment = clean_environment(base)
    assert "HTTPS_PROXY" not in environment
    assert "SGLANG_PLATFORM" not in environment
    assert "MC_X" not in environment
    assert environment["PATH"] == "/bin"
    assert environment["no_proxy"] == "*"


def test_the_gateway_gets_the_bootstrap_port_of_each_prefill_server() -> None:
    command = router_command(
        "gateway", host="127.0.0.1", port=20009, metrics_port=20010, prefill=[PREFILL], decode=[DECODE]
    )
    start = command.index("--prefill")
    assert command[start : start + 3] == ["--prefill", "http://10.193.0.1:20001", "20002"]
    assert flag(command, "--decode") == "http://10.193.0.2:20003"
    assert "--mini-lb" not in command


def test_mini_lb_is_asked_for_by_its_flag() -> None:
    command = router_command(
        "mini_lb", host="127.0.0.1", port=20009, metrics_port=20010, prefill=[PREFILL], decode=[DECODE]
    )
    assert "--mini-lb" in command


def test_a_page_stays_leased_longer_than_a_slow_link_takes_for_a_batch() -> None:
    command = mooncake_master_command("mooncake_master", host="0.0.0.0", port=1, metrics_port=2)
    lease_ms = int(next(word for word in command if "kv_lease" in word).partition("=")[2])
    batch_s = 128 * 64 * 16_384 * 8 / 200e6  # 128 pages of the fixed setting at the slowest storage link
    assert lease_ms / 1000 > 4 * batch_s


def test_kv_bytes_of_the_identity_model_are_those_of_the_fixed_setting(model: Path) -> None:
    assert kv_bytes_per_token(model) == 16 * 1024


def test_kv_bytes_of_mla_count_one_latent_per_layer(tmp_path: Path) -> None:
    config = {"dtype": "bfloat16", "num_hidden_layers": 8, "kv_lora_rank": 192, "qk_rope_head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert kv_bytes_per_token(tmp_path) == 8 * 256 * 2


def test_a_node_on_one_network_cannot_hold_a_server() -> None:
    with pytest.raises(ValueError, match="not on both networks"):
        Place.in_node(Node("store", "ns", "10.192.0.3", None), port=1, bootstrap_port=2)


def test_the_bucket_of_a_link_holds_at_least_one_segmented_send() -> None:
    arguments = tbf_arguments(100_000_000)
    assert arguments[:3] == ["tbf", "rate", "100000000bit"]
    assert int(arguments[arguments.index("burst") + 1]) >= 64 * 1024
