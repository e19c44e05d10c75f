"""Metrics are made late, once, and never in the way."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
from prometheus_client import REGISTRY
from prometheus_client import Counter as PrometheusCounter

from sglang_dualpath import metrics


def run(code: str, **environment: str) -> str:
    """The output of `code` in a process of its own."""
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    clean = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | path | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def copy_of_module() -> ModuleType:
    """The module imported anew under another name, as when two copies of the package meet in one process."""
    spec = importlib.util.spec_from_file_location("metrics_copy", metrics.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_counter_is_exported_with_its_labels() -> None:
    metrics.READ_BYTES.add(4096, engine_role="prefill", path="exported")
    metrics.READ_BYTES.add(4, engine_role="prefill", path="exported")
    labels = {"engine_role": "prefill", "path": "exported"}
    assert REGISTRY.get_sample_value("sglang_dualpath_read_bytes_total", labels) == 4100
    assert metrics.READ_BYTES.value(**labels) == 4100


def test_a_gauge_is_exported_and_goes_down() -> None:
    metrics.RESERVE_SLOTS.set(12, state="free")
    metrics.RESERVE_SLOTS.set(3, state="free")
    assert REGISTRY.get_sample_value("sglang_dualpath_reserve_slots", {"state": "free"}) == 3


def test_a_metric_without_labels_is_exported() -> None:
    before = metrics.RECEIVED_BYTES.value()
    metrics.RECEIVED_BYTES.add(7)
    metrics.READ_QUEUE_BYTES.set(9)
    assert metrics.RECEIVED_BYTES.value() == before + 7
    assert REGISTRY.get_sample_value("sglang_dualpath_read_queue_bytes") == 9


def test_snapshot_names_values_as_the_exposition_does() -> None:
    metrics.FALLBACKS.add(reason="snapshot")
    metrics.WRITTEN_BACK_BYTES.add(5)
    values = metrics.snapshot()
    assert values['sglang_dualpath_fallbacks_total{reason="snapshot"}'] == 1
    assert values["sglang_dualpath_written_back_bytes_total"] >= 5


def test_a_value_that_was_never_counted_is_zero() -> None:
    assert metrics.OFFERS.value(outcome="never") == 0
    assert not [name for name in metrics.snapshot() if "never" in name]


@pytest.mark.parametrize("labels", [{}, {"reason": "x"}, {"kind": "x", "reason": "y"}])
def test_wrong_labels_are_an_error(labels: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="has the labels"):
        metrics.CONTROL_ERRORS.add(1, **labels)
    with pytest.raises(ValueError, match="has the labels"):
        metrics.RESERVE_SLOTS.set(1, **labels)


@pytest.mark.parametrize("amount", [-1, float("nan")])
def test_a_counter_does_not_go_down(amount: float) -> None:
    with pytest.raises(ValueError, match="cannot go down"):
        metrics.CLAIMS.add(amount, outcome="landed")


def test_threads_may_count_at_once() -> None:
    def count() -> None:
        for _ in range(500):
            metrics.REQUESTS.add(outcome="threads")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.REQUESTS.value(outcome="threads") == 2000
    assert REGISTRY.get_sample_value("sglang_dualpath_requests_total", {"outcome": "threads"}) == 2000


def test_a_second_copy_of_the_module_counts_into_the_same_metrics() -> None:
    copy = copy_of_module()
    metrics.PUSHED_BYTES.add(1, engine_role="copies")
    copy.PUSHED_BYTES.add(2, engine_role="copies")
    metrics.READ_QUEUE_BYTES.set(1)
    copy.READ_QUEUE_BYTES.set(2)
    assert REGISTRY.get_sample_value("sglang_dualpath_pushed_bytes_total", {"engine_role": "copies"}) == 3
    assert REGISTRY.get_sample_value("sglang_dualpath_read_queue_bytes") == 2


def test_a_name_that_means_something_else_is_logged_once_and_counted_locally(caplog: pytest.LogCaptureFixture) -> None:
    PrometheusCounter("sglang_dualpath_taken_total", "Somebody else's.", ("other",))
    taken = copy_of_module().Counter("taken_total", "Ours.", ("reason",))
    taken.add(1, reason="x")
    taken.add(1, reason="x")
    assert taken.value(reason="x") == 2
    assert sum("cannot be exported" in record.getMessage() for record in caplog.records) == 1


def test_a_gauge_that_cannot_be_exported_is_kept_locally(caplog: pytest.LogCaptureFixture) -> None:
    PrometheusCounter("sglang_dualpath_taken_gauge", "Somebody else's.", ("other",))
    taken = copy_of_module().Gauge("taken_gauge_total", "Ours.")
    taken.set(4)
    taken.set(5)
    assert taken.value() == 5
    assert sum("cannot be exported" in record.getMessage() for record in caplog.records) == 1


def test_importing_the_module_does_not_import_prometheus_client() -> None:
    code = "import sys, sglang_dualpath.metrics; print('prometheus_client' in sys.modules)"
    assert run(code).strip() == "False"


def test_processes_are_summed_though_the_directory_is_named_after_the_import(tmp_path: Path) -> None:
    code = f"""
import os
from sglang_dualpath import metrics
os.environ["PROMETHEUS_MULTIPROC_DIR"] = {str(tmp_path)!r}
metrics.READ_BYTES.add(10, engine_role="decode", path="storage")
metrics.RESERVE_SLOTS.set(3, state="free")
"""
    run(code)
    run(code)
    collected = run(
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess\n"
        "registry = CollectorRegistry()\n"
        "multiprocess.MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())",
        PROMETHEUS_MULTIPROC_DIR=str(tmp_path),
    )
    assert 'sglang_dualpath_read_bytes_total{engine_role="decode",path="storage"} 20.0' in collected
    assert 'sglang_dualpath_reserve_slots{state="free"} 6.0' in collected


def test_a_missing_multiprocess_directory_does_not_fail_the_caller(tmp_path: Path) -> None:
    code = "from sglang_dualpath import metrics\nmetrics.RECEIVED_BYTES.add(3)\nprint(metrics.snapshot())"
    output = run(code, PROMETHEUS_MULTIPROC_DIR=str(tmp_path / "missing"))
    assert output.strip() == "{'sglang_dualpath_received_bytes_total': 3.0}"
