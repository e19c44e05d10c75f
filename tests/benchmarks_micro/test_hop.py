"""The hop's microbenchmark: between real transfer engines at tiny sizes, and what is made of its samples."""

from __future__ import annotations

import importlib.util
import itertools
import json

import pytest
from typer.testing import CliRunner

from benchmarks.micro import fabrics
from benchmarks.micro.__main__ import _sizes, app
from benchmarks.micro.ends import Shape
from benchmarks.micro.errors import BenchmarkError
from benchmarks.micro.hop import PATHS, HopSettings, Sample, bandwidth_report, cpu_report, measure, size_text
from benchmarks.micro.pages import PagePool, scattered
from benchmarks.micro.workers import Cpu

MIB = 1 << 20


def sample(path: str, megabytes_per_s: float, *, message_bytes: int = MIB, cpu_s: float = 0.0) -> Sample:
    moved = 10**9
    return Sample(path, message_bytes, moved, moved / (megabytes_per_s * 1e6), Cpu(cpu_s, cpu_s / 2), Cpu(cpu_s, 0.0))


@pytest.mark.parametrize("transport", ["mooncake", "nixl"])
def test_every_path_brings_every_byte_and_is_measured_alternating(transport: str) -> None:
    # Smaller than a page of the fixed setting: one page a message. `measure` compares the bytes at both ends.
    settings = HopSettings(transport, message_bytes=(8 << 10,), sample_bytes=64 << 10, repetitions=2, warm_up=0)
    samples = measure(settings)
    assert [one.path for one in samples] == [*PATHS, *reversed(PATHS)]
    assert all(one.moved_bytes == 64 << 10 and one.seconds > 0 for one in samples)


def test_messages_of_several_pages_are_joined_where_they_lie_together() -> None:
    assert HopSettings(sample_bytes=64 * MIB).shape(16 * MIB) == Shape(64, MIB, 16, 6 * 16)
    assert HopSettings(sample_bytes=64 * MIB).shape(64 << 10) == Shape(1024, 64 << 10, 1, 6)
    assert HopSettings(sample_bytes=64 * MIB, sample_messages=16).shape(64 << 10).pages == 16
    assert HopSettings(sample_bytes=MIB).shape(4 * MIB).pages == 8  # two messages at least


def test_bandwidth_is_compared_by_medians_and_held_against_the_target() -> None:
    samples = [sample("bare", rate) for rate in (900, 1000, 5000)]
    samples += [sample("push", rate) for rate in (100, 890, 990)]
    samples += [sample("bare", 100, message_bytes=1024), sample("push", 10, message_bytes=1024)]
    report = bandwidth_report(HopSettings(), samples)
    shares = {ratio.labels["message"]: ratio for ratio in report.ratios}
    assert shares["1 MiB"].value == pytest.approx(0.89)
    assert shares["1 MiB"].reached is False
    assert shares["1 KiB"].reached is None
    row = next(row for row in report.rows if row.labels == {"message": "1 MiB", "path": "bare"})
    assert (row.summary.median, row.summary.n) == (pytest.approx(1.0), 3)


def test_cpu_time_is_told_for_each_end_by_gigabyte() -> None:
    report = cpu_report(HopSettings(), [sample("push", 500, cpu_s=0.4), sample("push", 500, cpu_s=0.8)])
    found = {(row.labels["end"], row.quantity): row.summary.median for row in report.rows}
    assert found == {
        ("source", "CPU time"): pytest.approx(0.9),
        ("source", "of it in the kernel"): pytest.approx(0.3),
        ("target", "CPU time"): pytest.approx(0.6),
        ("target", "of it in the kernel"): 0.0,
    }


def test_a_path_that_does_not_exist_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="'pigeon'"):
        measure(HopSettings(paths=("pigeon",)))


@pytest.mark.parametrize(("name", "says"), [("nixl", r"`nixl`\.$"), ("mooncake", r"non-cuda build\.$")])
def test_a_transfer_engine_that_is_not_installed_is_named_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else found(asked))
    with pytest.raises(BenchmarkError, match=says):
        fabrics.fabric(name)
    for command in ("hop", "cpu"):
        result = CliRunner().invoke(app, [command, "--transport", name])
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.strip().count("\n") == 0


def test_each_command_makes_its_own_report_of_the_samples_that_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HopSettings] = []

    def measure(settings: HopSettings, on_sample: object) -> list[Sample]:
        asked.append(settings)
        return [sample(path, 500, cpu_s=0.4) for path in settings.paths]

    monkeypatch.setattr("benchmarks.micro.hop.measure", measure)
    for command in ("hop", "cpu"):
        result = CliRunner().invoke(app, [command, "--json", "--repetitions", "1"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["benchmark"] == command
    assert [settings.paths for settings in asked] == [tuple(PATHS), ("bare", "push", "reader", "tcp")]


def test_pages_have_the_geometry_of_sglangs_pool() -> None:
    pool = PagePool(6, 4096)
    keys, values = pool.pages.planes
    assert (keys.stride_bytes, keys.page_bytes) == (values.stride_bytes, values.page_bytes) == (2048, 2048)
    assert values.base - keys.base == 6 * 2048
    assert pool.pages.geometry.regions() == [(pool.address, 6 * 4096)]


def test_scattered_pages_are_all_pages_and_hardly_ever_neighbours() -> None:
    slots = scattered(256)
    assert sorted(slots) == list(range(256))
    assert sum(later - earlier == 1 for earlier, later in itertools.pairwise(slots)) < 8


def test_sizes_must_be_whole_pages() -> None:
    assert _sizes("64,1024,16384") == (64 << 10, MIB, 16 * MIB)
    for text in ("1500", "0", "x"):
        with pytest.raises(BenchmarkError, match="--message-kib"):
            _sizes(text)
    assert [size_text(size) for size in (64 << 10, MIB, 100)] == ["64 KiB", "1 MiB", "100 B"]


def test_json_is_all_that_is_printed() -> None:
    result = CliRunner().invoke(app, ["ledger", "--json", "--pages", "20", "--repetitions", "2"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["benchmark"] == "ledger"
