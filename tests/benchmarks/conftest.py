from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare.presets import PRESETS
from benchmarks.compare.runner import workload_of
from benchmarks.compare.schema import Repetition, Result, Samples, Settings
from benchmarks.compare.summary import summarise
from benchmarks.load.measures import Record, latencies
from benchmarks.testbed import KV_BYTES_PER_TOKEN, PAGE_TOKENS


def _fake_server() -> Any:
    # Loaded by path: a folder of tests of this name cannot be a package beside the package that it tests.
    name = "fake_sglang_server"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("fake_server.py"))
        assert spec is not None and spec.loader is not None  # noqa: PT018
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def server() -> Iterator[Any]:
    with _fake_server().running() as fake:
        yield fake


class Made:
    """Results as a run would make them, with chosen job times."""

    stock = (100.0, 102.0, 98.0, 101.0, 99.0)
    """Job times of repetitions, in seconds."""
    ours = (51.0, 52.0, 50.0, 51.5, 50.5)

    def __init__(self) -> None:
        self.settings: Settings = PRESETS["pair"]
        self.hits = workload_of(self.settings).total_hit_tokens(PAGE_TOKENS)

    def repetition(self, system: str, number: int, jct_s: float, **changes: Any) -> Repetition:
        records = [Record(0, 0, 0.0, 1.0, 1.1, jct_s, prompt_tokens=8000, output_tokens=16, read_s=0.5)]
        rate = 25e6
        return Repetition(**{
            "system": system, "number": number, "records": records, "measured": latencies(records),
            "windows_s": [(0.0, jct_s)],
            "samples": Samples([0.0, jct_s / 2, jct_s], {"prefill/storage/rx": [0, 50, 100]}, [0.0, 0.5, 0.5]),
            "link_bytes": {"prefill/storage/rx": 100}, "probe_bytes_per_s": {"prefill": rate, "decode": rate},
            "snic_busy": {"prefill": 0.97, "decode": 0.1}, "hit_tokens": self.hits,
            "read_bytes": self.hits * KV_BYTES_PER_TOKEN,
            "counted_read_bytes": {"prefill": self.hits * KV_BYTES_PER_TOKEN} if "dualpath" in system else {},
            "written_bytes": 7, "cpu_busy": 0.5, "base_ttft_s": 0.5, "failed": 0, "start_s": 1.0,
        } | changes)  # fmt: skip

    def result(self, times_s: Mapping[str, Sequence[float]], **changes: Any) -> Result:
        repetitions = [self.repetition(system, number, jct_s, **changes)
                       for system, values in times_s.items() for number, jct_s in enumerate(values)]  # fmt: skip
        return summarise(self.settings, workload_of(self.settings), repetitions, sustained={}, versions={}, total_s=1.0)


@pytest.fixture
def made() -> Made:
    return Made()


@pytest.fixture
def result(made: Any) -> Any:
    """Of a run in which ours took half as long as stock."""
    return made.result({"sgl_mc": made.stock, "dualpath:split": made.ours})
