"""Every combination that is refused at start: one sentence that names the flag and says why, and a non-zero exit."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from sglang_dualpath.compat import arguments
from sglang_dualpath.compat.stores import hop_devices, shared_devices
from tests.compat.conftest import Argv
from tests.compat.forks import ForkServer, Outcome, request

# The first test of a run waits for the process that imports SGLang, on a machine that may be in use.
pytestmark = pytest.mark.timeout(420)


ONE_READER = "do not agree on a read yet"
MORE_POOLS = "not read together with the KV pages"


class Case(NamedTuple):
    """Flags beside a good command line, and what the sentence must say."""

    flags: tuple[str, ...]
    says: tuple[str, ...]
    mode: str | None = "decode"
    storage: str | None = "file"
    env: tuple[tuple[str, str], ...] = ()


CASES = {
    "no role": Case((), ("--disaggregation-mode prefill or decode", "both sides"), mode=None),
    "no radix cache": Case(("--disable-radix-cache",), ("--disable-radix-cache", "keeps prefixes"), mode="prefill"),
    "no radix cache, decode": Case(("--disable-radix-cache",), ("--disable-radix-cache", "keeps prefixes")),
    "other radix cache": Case(("--radix-cache-backend", "flexkv"), ("--radix-cache-backend flexkv", "its own")),
    "prefill without storage": Case(
        (), ("--hicache-storage-backend", "--hicache-storage-backend-extra-config"), mode="prefill", storage=None
    ),
    "decode without storage": Case(
        (),
        (
            "copy --hicache-storage-backend and --hicache-storage-backend-extra-config",
            "--hicache-mem-layout",
            "--page-size",
            "from its prefill servers' command line",
        ),
        storage=None,
    ),
    "NIXL over another network library": Case(
        ("--disaggregation-transfer-backend", "nixl"),
        ("SGLANG_DISAGGREGATION_NIXL_BACKEND=LIBFABRIC", "when its writes have ended", "UCX"),
        env=(("SGLANG_DISAGGREGATION_NIXL_BACKEND", "LIBFABRIC"),),
    ),
    "pipeline parallel": Case(("--pp-size", "2"), ("--pp-size 2", ONE_READER)),
    "context parallel": Case(("--attn-cp-size", "2", "--tp-size", "2"), ("--attn-cp-size 2", ONE_READER)),
    "context parallel alone": Case(("--attn-cp-size", "2"), ("--attn-cp-size 2", ONE_READER)),
    "decode context parallel": Case(("--dcp-size", "2"), ("--dcp-size 2", ONE_READER)),
    "data parallel, files of each rank": Case(
        (
            *("--dp-size", "2", "--hicache-storage-backend-extra-config"),
            '{"master_server_address": "10.0.0.1:50051", "enable_ssd_offload": true, "ssd_offload_path": "/ssd"}',
        ),
        ("--dp-size 2 with this mooncake store", "one place on disk"),
        storage="mooncake",
    ),
    "attention data parallel": Case(("--attn-dp-size", "2"), ("--attn-dp-size 2", ONE_READER)),
    "attention data parallel, old spelling": Case(
        ("--dp-size", "2", "--enable-dp-attention"), ("--enable-dp-attention", ONE_READER)
    ),
    "cache sharding": Case(("--enable-kv-cache-sharding",), ("--enable-kv-cache-sharding", ONE_READER)),
    "draft model": Case(
        ("--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", "x"),
        ("--speculative-algorithm EAGLE", MORE_POOLS),
    ),
    "draft without a model": Case(("--speculative-algorithm", "NGRAM"), ("--speculative-algorithm NGRAM", MORE_POOLS)),
    "decoupled drafting": Case(("--decoupled-spec-role", "verifier"), ("--decoupled-spec-role verifier", MORE_POOLS)),
    "sparse host cache": Case(("--enable-hisparse",), ("--enable-hisparse", MORE_POOLS)),
    "encoder": Case(("--encoder-only",), ("--encoder-only", "no KV cache"), mode=None),
    "encoder with a role": Case(("--encoder-only",), ("--encoder-only", "no KV cache")),
    "language model of an encoder": Case(("--language-only",), ("--language-only", "encoder"), mode="prefill"),
    "transfer backend mori": Case(
        ("--disaggregation-transfer-backend", "mori"), ("--disaggregation-transfer-backend mori", "mooncake", "nixl")
    ),
    "transfer backend fake": Case(
        ("--disaggregation-transfer-backend", "fake"), ("--disaggregation-transfer-backend fake", "mooncake")
    ),
    "late allocation": Case(
        ("--disaggregation-decode-allocation-policy", "prefill_complete"),
        ("--disaggregation-decode-allocation-policy prefill_complete", "before prefill is complete"),
    ),
    "late allocation, prefill": Case(
        ("--disaggregation-decode-allocation-policy", "prefill_complete"),
        ("--disaggregation-decode-allocation-policy prefill_complete", "before prefill is complete"),
        mode="prefill",
    ),
    "role switch": Case(("--enable-pd-role-switch",), ("--enable-pd-role-switch", "one role")),
    "host receive": Case(
        ("--disaggregation-decode-host-receive-threshold", "0.5"),
        ("--disaggregation-decode-host-receive-threshold 0.5", "not contiguous"),
    ),
    "offload": Case(
        ("--disaggregation-decode-enable-offload-kvcache",),
        ("--disaggregation-decode-enable-offload-kvcache", "already writes back"),
    ),
    "transient host memory": Case(
        ("--hicache-host-memory-mode", "buffer_only"),
        ("--hicache-host-memory-mode buffer_only", "between reads"),
        mode="prefill",
    ),
    "transient host memory, decode": Case(
        ("--hicache-host-memory-mode", "buffer_only"), ("--hicache-host-memory-mode buffer_only", "between reads")
    ),
    "MLA host dedup": Case(("--enable-linker-mla-dedup",), ("--enable-linker-mla-dedup", "ranks without pages")),
    "lmcache": Case(("--enable-lmcache",), ("--enable-lmcache", "replaces the radix cache")),
    "flexkv": Case(("--enable-flexkv",), ("--enable-flexkv", "replaces the radix cache")),
    "linker": Case(
        ("--enable-unified-cache-external-linker",),
        ("--enable-unified-cache-external-linker", "replaces the host cache"),
    ),
    "layout": Case(
        ("--hicache-mem-layout", "layer_first"), ("--hicache-mem-layout layer_first", "contiguous", "page_first")
    ),
    "layout by head": Case(
        ("--hicache-mem-layout", "page_head", "--hicache-io-backend", "kernel"),
        ("--hicache-mem-layout page_head", "contiguous"),
    ),
    "store": Case((), ("--hicache-storage-backend eic", "straight into host pages", "mooncake"), storage="eic"),
    "dynamic store without zero copy": Case(
        ("--hicache-storage-backend-extra-config", json.dumps({"backend_name": "x"})),
        ("--hicache-storage-backend dynamic", '"interface_v1": 1'),
        storage="dynamic",
    ),
    "dynamic store with bad settings": Case(
        ("--hicache-storage-backend-extra-config", "{"),
        ("--hicache-storage-backend-extra-config", "cannot be read"),
        storage="dynamic",
    ),
    "dynamic store with no file": Case(
        ("--hicache-storage-backend-extra-config", "@/nowhere.json"),
        ("--hicache-storage-backend-extra-config", "cannot be read"),
        storage="dynamic",
    ),
    "dynamic store with settings that are a list": Case(
        ("--hicache-storage-backend-extra-config", "[]"),
        ("--hicache-storage-backend-extra-config", "cannot be read"),
        storage="dynamic",
    ),
    "ray": Case(("--use-ray",), ("--use-ray", "plugins")),
    "rust server": Case(
        (), ("SGLANG_RUST_SERVER", "control endpoints"), mode="prefill", env=(("SGLANG_RUST_SERVER", "1"),)
    ),
    "rust server, spelt out": Case((), ("SGLANG_RUST_SERVER",), mode="prefill", env=(("SGLANG_RUST_SERVER", "yes"),)),
}


@pytest.fixture(scope="module")
def refused(forks: ForkServer, argv: Argv) -> Mapping[str, Outcome]:
    """Outcome of each case, by its name."""
    requests = [
        request("launch_server", argv(case.mode, *case.flags, storage=case.storage), env=dict(case.env))
        for case in CASES.values()
    ]
    return dict(zip(CASES, forks.run_all(requests), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_is_refused_in_one_sentence(refused: Mapping[str, Outcome], name: str) -> None:
    sentence = refused[name].sentence
    assert refused[name].report is None
    assert "--kv-connector dualpath" in sentence or sentence.startswith("--hicache-storage-backend-extra-config")
    assert sentence.endswith(".")
    for words in CASES[name].says:
        assert words in sentence


@pytest.mark.parametrize("shell", ["python", "serve"])
def test_both_command_lines_refuse(forks: ForkServer, argv: Argv, shell: str) -> None:
    assert "copy --hicache-storage-backend" in forks.run("launch_server", argv("decode", storage=None), shell).sentence


@pytest.mark.parametrize("name", ["decode without storage", "layout", "store"])
def test_without_the_flag_none_of_it_is_our_business(forks: ForkServer, argv: Argv, name: str) -> None:
    case = CASES[name]
    outcome = forks.run("launch_server", argv(case.mode, *case.flags, storage=case.storage, switch=False))
    assert outcome.code == 0, outcome.stderr


@pytest.mark.parametrize(
    ("flags", "storage"),
    [
        (("--hicache-storage-backend-extra-config", '{"interface_v1": 1, "backend_name": "x"}'), "dynamic"),
        (("--hicache-mem-layout", "page_first"), "file"),
        (("--hicache-mem-layout", "layer_first", "--hicache-io-backend", "kernel"), "mooncake"),
        (("--disaggregation-transfer-backend", "mooncake_tcp"), "file"),
        (("--disaggregation-transfer-backend", "nixl"), "file"),
        (("--hicache-write-policy", "write_through_selective"), "file"),
        (("--tp-size", "2"), "file"),
        (("--dp-size", "2"), "file"),
        (("--dp-size", "2"), "mooncake"),
    ],
)
def test_is_not_refused(forks: ForkServer, argv: Argv, flags: tuple[str, ...], storage: str) -> None:
    outcome = forks.run("launch_server", argv("decode", *flags, storage=storage))
    assert outcome.code == 0, outcome.stderr


def test_nixl_without_its_package_is_refused(forks: ForkServer, argv: Argv) -> None:
    line = argv("prefill", "--disaggregation-transfer-backend", "nixl")
    sentence = forks.run("launch_server_without", "nixl", line).sentence
    assert "--disaggregation-transfer-backend nixl without the package nixl" in sentence
    assert sentence.endswith("pip install nixl.")
    assert forks.run("launch_server_without", "nixl", argv("prefill")).code == 0


@pytest.mark.parametrize(("version", "refused"), [("1.4.2", True), ("1.5", False), ("1.10.0", False), (None, False)])
def test_a_nixl_that_is_too_old_is_known(
    monkeypatch: pytest.MonkeyPatch, version: str | None, refused: bool
) -> None:
    def installed(package: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert arguments.is_older("nixl", arguments.OLDEST_NIXL) is refused


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"), [("is_hybrid_swa", "sliding-window"), ("is_hybrid_ssm", "Mamba"), ("is_dsa", "DSA")]
)
def test_models_with_more_than_one_pool_are_refused_where_their_tree_would_be_made(
    forks: ForkServer, kind: str, name: str
) -> None:
    sentence = forks.run("special_model", kind, env={"SGLANG_KV_CONNECTOR": "dualpath"}).sentence
    assert f"does not support {name} models" in sentence
    assert MORE_POOLS in sentence


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("store", "hop", "shared"),
    [
        ("mlx5_0", "mlx5_1", None),
        ("mlx5_0,mlx5_2", "mlx5_1", None),
        ("mlx5_0", "mlx5_0", "mlx5_0"),
        ("mlx5_0, mlx5_1", "mlx5_2,mlx5_1", "mlx5_1"),
        ('{"0": "mlx5_0", "1": "mlx5_3"}', "mlx5_3", "mlx5_3"),
        ("mlx5_0", '{"0": "mlx5_1,mlx5_2"}', None),
        ("", "mlx5_1", "mlx5_1"),
        ("mlx5_0", None, "mlx5_0"),
        ("", None, "chosen from all"),
        ("{broken", "mlx5_0", None),
    ],
)
def test_devices_that_store_and_hop_share(store: str, hop: str | None, shared: str | None) -> None:
    assert shared_devices(store, hop) == shared


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("mlx5_0:1,mlx5_1:1", "mlx5_0,mlx5_1"),
        ("all", None),
        ("^mlx5_1:1", None),
        ("", "of the flag"),
    ],
)
def test_devices_that_ucx_was_given(monkeypatch: pytest.MonkeyPatch, said: str, means: str | None) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", said)
    flags = SimpleNamespace(disaggregation_transfer_backend="nixl", disaggregation_ib_device="of the flag")
    assert hop_devices(flags) == means


def test_devices_in_a_file_are_read(tmp_path: Path) -> None:
    devices = tmp_path / "devices.json"
    devices.write_text('{"0": "mlx5_4"}')
    assert shared_devices("mlx5_4", str(devices)) == "mlx5_4"
