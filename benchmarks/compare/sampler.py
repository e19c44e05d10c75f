"""Samples what links carry and what CPUs do while requests are in flight, from the kernel's own counters.

One thread reads a few files of /proc each time: some 0.3 ms, so four samples a second take no CPU worth mentioning.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.compare.schema import Samples
from benchmarks.testbed.network import Network

_CLONE_NEWNET = 0x40000000
RDMA_DEVICES = Path("/sys/class/infiniband")
_RDMA_COUNTER_BYTES = 4  # InfiniBand's specification counts port data in words of four bytes
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class LinkCounters(Protocol):
    """Where byte counters of links come from."""

    def enter(self) -> None:
        """Called once in the thread that will read."""

    def read(self) -> dict[str, int]:
        """Bytes so far by "NODE/NETWORK/DIRECTION"."""


class FabricCounters:
    """The fabric's ends of a testbed's links. `enter` moves the calling thread into the fabric's namespace for good."""

    def __init__(self, network: Network) -> None:
        self._namespace = Path("/var/run/netns", network.fabric)
        self._names = {port: f"{node}/{kind}" for (node, kind), port in network.ports.items()}

    def enter(self) -> None:
        """Raises OSError without root."""
        libc = ctypes.CDLL(None, use_errno=True)  # os.setns is there from Python 3.12 on
        with self._namespace.open() as file:
            if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {self._namespace}")

    def read(self) -> dict[str, int]:
        found = {}
        for device, (received, sent) in device_bytes(Path("/proc/thread-self/net/dev").read_text()).items():
            if device in self._names:  # the fabric's end sends what the node receives
                found[f"{self._names[device]}/rx"] = sent
                found[f"{self._names[device]}/tx"] = received
        return found


class LocalCounters:
    """Devices of this machine, by the name of the link that each is: "eth1", or "mlx5_0/1", port 1 of an RDMA device.

    What RDMA carries does not show in a network device's counters, so its ports have their own.
    """

    def __init__(self, devices: Mapping[str, str], rdma: Path = RDMA_DEVICES) -> None:
        """Raises ValueError, with a sentence for the user, for a device that is not there."""
        self._devices = dict(devices)
        self._rdma = rdma
        counters = device_bytes(Path("/proc/net/dev").read_text())
        for link, device in self._devices.items():
            if device not in counters and not self._port(device).is_dir():
                raise ValueError(
                    f"There is no device {device!r} for {link} here: take one of {', '.join(counters)}, "
                    "or an RDMA device and its port, as mlx5_0/1."
                )

    def enter(self) -> None:
        pass

    def read(self) -> dict[str, int]:
        counters = device_bytes(Path("/proc/net/dev").read_text())
        found = {}
        for link, device in self._devices.items():
            for way, count in zip(("rx", "tx"), counters.get(device) or self._port_bytes(device), strict=True):
                found[f"{link}/{way}"] = count
        return found

    def _port(self, device: str) -> Path:
        name, _, port = device.partition("/")
        return self._rdma / name / "ports" / (port or "1") / "counters"

    def _port_bytes(self, device: str) -> tuple[int, int]:
        received, sent = (
            int((self._port(device) / f"port_{way}_data").read_text()) * _RDMA_COUNTER_BYTES for way in ("rcv", "xmit")
        )
        return received, sent


class NoCounters:
    """For loopback, where there are no links."""

    def enter(self) -> None:
        pass

    def read(self) -> dict[str, int]:
        return {}


def device_bytes(text: str) -> dict[str, tuple[int, int]]:
    """(received, sent) bytes of each device, from the text of /proc/net/dev."""
    found = {}
    for line in text.splitlines()[2:]:
        device, _, rest = line.partition(":")
        fields = rest.split()
        found[device.strip()] = (int(fields[0]), int(fields[8]))
    return found


def cpu_ticks(text: str) -> list[tuple[int, int]]:
    """(busy, all) ticks of all cores, then of each, from the text of /proc/stat. Waiting for a disk is idle."""
    ticks = []
    for line in text.splitlines():
        if line.startswith("cpu"):
            fields = [int(word) for word in line.split()[1:9]]
            ticks.append((sum(fields) - fields[3] - fields[4], sum(fields)))
    return ticks


class Sampler:
    """Samples every `every_s` from `start` to `stop`; `times_s` count from the moment that `zero` names."""

    def __init__(self, counters: LinkCounters, *, every_s: float, groups: Mapping[str, Sequence[int]]) -> None:
        self._counters = counters
        self._every_s = every_s
        self._groups = {name: list(pids) for name, pids in groups.items()}
        self._ended = threading.Event()
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._times: list[float] = []
        self._links: list[dict[str, int]] = []
        self._ticks: list[list[tuple[int, int]]] = []
        self._cpu: list[dict[str, float]] = []

    def start(self) -> None:
        """Returns when the first sample is taken. Raises what reading the counters raised."""
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error

    def stop(self, zero: float) -> Samples:
        """Take a last sample and give all of them; `zero` is the `time.perf_counter()` at which times are 0."""
        self._ended.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        names = sorted(set.intersection(*(set(links) for links in self._links))) if self._links else []
        first = self._links[0]
        together, *cores = (_busy(series) for series in zip(*self._ticks, strict=False))
        return Samples(
            times_s=[round(at - zero, 4) for at in self._times],
            link_bytes={name: [links[name] - first[name] for links in self._links] for name in names},
            cpu_busy=together,
            core_busy=cores,
            process_cpu_s={name: self._cpu[-1][name] - self._cpu[0][name] for name in self._groups},
        )

    def _run(self) -> None:
        try:
            self._counters.enter()
            self._sample(processes=True)
            self._ready.set()
            due = time.perf_counter() + self._every_s
            while not self._ended.wait(max(0.0, due - time.perf_counter())):
                self._sample(processes=False)
                due += self._every_s
            self._sample(processes=True)
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    def _sample(self, *, processes: bool) -> None:
        self._times.append(time.perf_counter())
        self._links.append(self._counters.read())
        self._ticks.append(cpu_ticks(Path("/proc/stat").read_text()))
        if processes:
            self._cpu.append({name: sum(map(_cpu_s, pids)) for name, pids in self._groups.items()})


def between(samples: Samples, link: str, start_s: float, end_s: float) -> float:
    """Bytes that a link carried in an interval, by linear interpolation between samples; 0 for an unknown link."""
    series = samples.link_bytes.get(link)
    if not series:
        return 0.0
    return _at(samples.times_s, series, end_s) - _at(samples.times_s, series, start_s)


def busy_share(samples: Samples, link: str, windows_s: Sequence[tuple[float, float]], full_bytes_per_s: float) -> float:
    """Share of a link's full rate that it carried in the middle 80 % of each window."""
    carried = seconds = 0.0
    for start_s, end_s in windows_s:
        margin_s = (end_s - start_s) * 0.1
        carried += between(samples, link, start_s + margin_s, end_s - margin_s)
        seconds += end_s - start_s - 2 * margin_s
    return carried / (seconds * full_bytes_per_s) if seconds > 0 and full_bytes_per_s > 0 else 0.0


def busy_span_s(
    samples: Samples, links: Sequence[str], start_s: float, end_s: float, least_bytes_per_s: float
) -> float:
    """From the first to the last moment in an interval at which any of the links carried more than a rate.

    The reading time of a request that is alone. As fine as the samples; 0 if none did.
    """
    first = last = None
    times = samples.times_s
    for index in range(1, len(times)):
        if times[index] <= start_s or times[index - 1] >= end_s:
            continue
        seconds = times[index] - times[index - 1]
        carried = max((samples.link_bytes[link][index] - samples.link_bytes[link][index - 1] for link in links
                       if link in samples.link_bytes), default=0)  # fmt: skip
        if seconds > 0 and carried / seconds > least_bytes_per_s:
            first = times[index - 1] if first is None else first
            last = times[index]
    return 0.0 if first is None or last is None else last - first


def _at(times: Sequence[float], series: Sequence[int], time_s: float) -> float:
    if time_s <= times[0]:
        return float(series[0])
    for index in range(1, len(times)):
        if time_s <= times[index]:
            share = (time_s - times[index - 1]) / max(1e-9, times[index] - times[index - 1])
            return series[index - 1] + share * (series[index] - series[index - 1])
    return float(series[-1])


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _busy(ticks: Sequence[tuple[int, int]]) -> list[float]:
    pairs = itertools.pairwise(ticks)
    return [0.0, *(_share(after[0] - before[0], after[1] - before[1]) for before, after in pairs)]


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole > 0 else 0.0
