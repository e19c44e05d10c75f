"""Arithmetic of byte counters and CPU ticks, and one short run of the sampler itself."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.compare.sampler import LocalCounters, Sampler, between, busy_share, busy_span_s, cpu_ticks, device_bytes
from benchmarks.compare.schema import Samples

DEV = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      200       1    0    0    0     0       0          0
 s-1:5000000000       1    0    0    0     0          0         0  7       1    0    0    0     0       0          0
"""  # noqa: E501

STEADY = Samples(times_s=[0.0, 1.0, 2.0, 3.0], link_bytes={"p/storage/rx": [0, 100, 200, 300]})


def test_device_bytes_are_received_and_sent() -> None:
    assert device_bytes(DEV) == {"lo": (100, 200), "s-1": (5_000_000_000, 7)}


def test_waiting_for_a_disk_is_not_busy() -> None:
    text = "cpu  10 1 4 80 5 0 0 0 0 0\ncpu0 10 0 0 40 0 0 0 0 0 0\ncpu1 0 1 4 40 5 0 0 0 0 0\nintr 7\n"
    assert cpu_ticks(text) == [(15, 100), (10, 50), (5, 50)]


def test_bytes_between_samples_are_interpolated() -> None:
    assert between(STEADY, "p/storage/rx", 0.5, 2.25) == pytest.approx(175)
    assert between(STEADY, "p/storage/rx", -1.0, 9.0) == pytest.approx(300)
    assert between(STEADY, "no/such/link", 0.0, 1.0) == 0.0


def test_a_link_at_its_full_rate_is_wholly_busy() -> None:
    assert busy_share(STEADY, "p/storage/rx", [(0.0, 3.0)], 100.0) == pytest.approx(1.0)
    assert busy_share(STEADY, "p/storage/rx", [(0.0, 1.0), (2.0, 3.0)], 200.0) == pytest.approx(0.5)


def test_the_ends_of_a_window_do_not_count() -> None:
    late = Samples(times_s=[0.0, 1.0, 9.0, 10.0], link_bytes={"p": [0, 0, 800, 800]})
    assert busy_share(late, "p", [(0.0, 10.0)], 100.0) == pytest.approx(1.0)


def test_a_window_of_no_length_is_not_busy() -> None:
    assert busy_share(STEADY, "p/storage/rx", [(1.0, 1.0)], 100.0) == 0.0


def test_a_lone_read_lasts_from_the_first_to_the_last_byte_of_either_link() -> None:
    times = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    samples = Samples(times_s=times, link_bytes={"p": [0, 0, 90, 90, 90, 90], "d": [0, 0, 90, 180, 181, 181]})
    assert busy_span_s(samples, ["p", "d"], 0.0, 0.5, 100.0) == pytest.approx(0.2)
    assert busy_span_s(samples, ["p"], 0.0, 0.5, 100.0) == pytest.approx(0.1)
    assert busy_span_s(samples, ["p"], 0.3, 0.5, 100.0) == 0.0


class Growing:
    def __init__(self) -> None:
        self.value = 1000

    def enter(self) -> None:
        pass

    def read(self) -> dict[str, int]:
        self.value += 10
        return {"p/storage/rx": self.value}


class Refusing(Growing):
    def enter(self) -> None:
        raise OSError("no root")


def test_samples_begin_at_zero_bytes_and_never_fall() -> None:
    sampler = Sampler(Growing(), every_s=0.01, groups={"me": [os.getpid()], "gone": [2**22 + 1]})
    sampler.start()
    zero = time.perf_counter()
    time.sleep(0.05)
    samples = sampler.stop(zero)
    carried = samples.link_bytes["p/storage/rx"]
    assert carried[0] == 0
    assert carried == sorted(carried)
    assert len(samples.times_s) == len(carried) == len(samples.cpu_busy)
    assert [len(series) for series in samples.core_busy] == [len(samples.times_s)] * (os.cpu_count() or 0)
    assert samples.times_s[0] <= 0 < samples.times_s[-1]
    assert samples.process_cpu_s["me"] >= 0.0
    assert samples.process_cpu_s["gone"] == 0.0


def test_counters_that_cannot_be_read_are_an_error_at_the_start() -> None:
    with pytest.raises(OSError, match="no root"):
        Sampler(Refusing(), every_s=0.01, groups={}).start()


def test_rdma_ports_have_counters_of_their_own(tmp_path: Path) -> None:
    counters = tmp_path / "mlx5_0" / "ports" / "1" / "counters"
    counters.mkdir(parents=True)
    (counters / "port_rcv_data").write_text("1000\n")
    (counters / "port_xmit_data").write_text("50\n")
    links = LocalCounters({"prefill/storage": "mlx5_0/1", "decode/storage": "lo"}, tmp_path)
    found = links.read()
    assert (found["prefill/storage/rx"], found["prefill/storage/tx"]) == (4000, 200)  # in words of four bytes
    assert {"decode/storage/rx", "decode/storage/tx"} <= set(found)


@pytest.mark.parametrize("device", ["gone0", "mlx5_0/2"])
def test_a_device_that_is_not_there_is_an_error(tmp_path: Path, device: str) -> None:
    (tmp_path / "mlx5_0" / "ports" / "1" / "counters").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"no device '{device}' for prefill/storage"):
        LocalCounters({"prefill/storage": device}, tmp_path)
