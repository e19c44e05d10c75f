"""Bandwidth of the hop against the bare transport, and what it costs in CPU time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.micro.ends import Address, Shape, Source, Target, environment
from benchmarks.micro.errors import BenchmarkError
from benchmarks.micro.pages import PAGE_BYTES, scattered
from benchmarks.micro.report import Ratio, Report
from benchmarks.micro.workers import Cpu, Worker
from sglang_dualpath.config import DualPathConfig
from sglang_dualpath.reader.pump import ClaimPump

TARGET_SHARE = 0.9  # of the bare transport, from TARGET_FROM_BYTES on
TARGET_FROM_BYTES = 1 << 20
_CLAIMS = ClaimPump(DualPathConfig()).claims_per_engine  # so that none is refused for want of a spare

#: What is compared, and what each is.
PATHS: Mapping[str, str] = {
    "bare": "the transfer engine's write of contiguous messages",
    "pieces": "the same with each message in two pieces, as keys and values lie in a page",
    "push": "planned, joined and pushed pages that were allocated together",
    "push_scattered": "the same with pages that lie apart on both sides",
    "reader": "whole reads: claim, grant, push, done, by the decode engine's reader threads",
    "reader_scattered": "the same with pages that lie apart on both sides",
    "tcp": "one plain TCP connection, each message acknowledged",
}


@dataclass(frozen=True)
class HopSettings:
    """`sample_bytes` are moved for one sample, in messages of each of the sizes, but at most `sample_messages`."""

    transport: str = "mooncake"
    message_bytes: tuple[int, ...] = (64 << 10, 1 << 20, 16 << 20)
    sample_bytes: int = 256 << 20
    sample_messages: int = 1024
    repetitions: int = 20
    warm_up: int = 2
    paths: tuple[str, ...] = tuple(PATHS)

    def shape(self, message_bytes: int) -> Shape:
        """Pages of the fixed setting, or of the message's size if that is smaller."""
        page_bytes = min(PAGE_BYTES, message_bytes)
        messages = max(2, min(self.sample_bytes // message_bytes, self.sample_messages))
        message_pages = message_bytes // page_bytes
        return Shape(messages * message_pages, page_bytes, message_pages, _CLAIMS * message_pages)


@dataclass(frozen=True)
class Sample:
    """One pass over all messages by one path, with the CPU time of both ends."""

    path: str
    message_bytes: int
    moved_bytes: int
    seconds: float
    source: Cpu
    target: Cpu

    @property
    def bytes_per_s(self) -> float:
        return self.moved_bytes / self.seconds


class Hop:
    """Two processes and the ways to move bytes from the one to the other."""

    def __init__(self, transport: str) -> None:
        """Raises BenchmarkError when the transport is not there."""
        settings = environment(transport)
        self.target = Worker("hop-target", Target, transport, environment=settings)
        try:
            self.source = Worker("hop-source", Source, transport, environment=settings)
        except BaseException:
            self.target.close()
            raise
        self._rooms = itertools.count(1)

    def open(self, shape: Shape) -> None:
        """Give both ends memory of this shape."""
        self._shape = shape
        address: Address = self.target.call("open", shape)
        self.source.call("open", shape, address)
        together, apart = list(range(shape.pages)), scattered(shape.pages)
        # Not the same order on both sides: what is contiguous on one side only cannot be joined.
        self._slots: dict[str, tuple[list[int] | None, list[int] | None]] = {
            "": (together, together),
            "_scattered": (apart, apart[::-1]),
        }

    def sample(self, path: str) -> Sample:
        """One pass by this path. Raises WorkerError when anything of it failed."""
        before = self.source.cpu(), self.target.cpu()
        seconds = self._pass(path)
        source, target = self.source.cpu().since(before[0]), self.target.cpu().since(before[1])
        return Sample(path, self._shape.message_bytes, self._shape.total_bytes, seconds, source, target)

    def _pass(self, path: str) -> float:
        kind, _, order = path.partition("_")
        ours, theirs = self._slots[f"_{order}" if order else ""]
        if kind == "push":
            return float(self.source.call("push", ours, theirs))
        if kind != "reader":
            return float(self.source.call(kind))
        room = next(self._rooms)
        self.target.call("begin_read", room, theirs)
        self.source.call("begin_read", room)
        start_s = self.source.call("read", ours)
        return float(self.target.call("landed_s") - start_s)

    def check(self, path: str) -> None:
        """Raises BenchmarkError unless a pass by this path brings every byte to its place."""
        ours, theirs = self._slots["_scattered" if path.endswith("_scattered") else ""]
        if path in ("bare", "pieces", "tcp"):  # which move memory and know no pages
            ours = theirs = None
        self.target.call("clear")
        self._pass(path)
        if self.source.call("digest", ours) != self.target.call("digest", theirs):
            raise BenchmarkError(f"{path} brought other bytes than were sent.")

    def close(self) -> None:
        self.source.close()
        self.target.close()


def measure(settings: HopSettings, on_sample: Callable[[Sample], None] = lambda sample: None) -> list[Sample]:
    """Samples of all paths at all sizes, the paths alternating, every other time in reverse order."""
    unknown = [path for path in settings.paths if path not in PATHS]
    if unknown:
        raise BenchmarkError(f"No path is called {unknown[0]!r}: {', '.join(PATHS)}.")
    samples = []
    hop = Hop(settings.transport)
    try:
        for message_bytes in settings.message_bytes:
            hop.open(settings.shape(message_bytes))
            for path in settings.paths:
                hop.check(path)
                for _ in range(settings.warm_up):
                    hop.sample(path)
            for repetition in range(settings.repetitions):
                for path in settings.paths if repetition % 2 == 0 else settings.paths[::-1]:
                    samples.append(hop.sample(path))
                    on_sample(samples[-1])
    finally:
        hop.close()
    return samples


def size_text(size_bytes: int) -> str:
    """`size_bytes` as people write sizes of messages."""
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes % factor == 0:
            return f"{size_bytes // factor} {unit}"
    return f"{size_bytes} B"


def by_case(samples: list[Sample]) -> dict[tuple[int, str], list[Sample]]:
    """Samples by message size and path, in the order in which they were first seen."""
    cases: dict[tuple[int, str], list[Sample]] = {}
    for sample in samples:
        cases.setdefault((sample.message_bytes, sample.path), []).append(sample)
    return dict(sorted(cases.items(), key=lambda item: item[0][0]))


def spoken_settings(settings: HopSettings) -> dict[str, Any]:
    return {**vars(settings), "page_bytes": [settings.shape(size).page_bytes for size in settings.message_bytes]}


def bandwidth_report(settings: HopSettings, samples: list[Sample]) -> Report:
    """Bandwidth by message size and path, and each path's share of the bare transport."""
    report = Report("hop", spoken_settings(settings))
    medians: dict[tuple[int, str], float] = {}
    for (size, path), case in by_case(samples).items():
        rates = [sample.bytes_per_s / 1e9 for sample in case]
        medians[size, path] = report.add("bandwidth", "GB/s", rates, message=size_text(size), path=path).median
    for (size, path), median in medians.items():
        if path != "bare" and (size, "bare") in medians:
            ours = path not in ("pieces", "tcp") and size >= TARGET_FROM_BYTES
            share = median / medians[size, "bare"]
            labels = {"message": size_text(size)}
            report.ratios.append(Ratio(f"{path}/bare", labels, share, TARGET_SHARE if ours else None))
    return report


def cpu_report(settings: HopSettings, samples: list[Sample]) -> Report:
    """CPU seconds per GB that either end spends, by message size and path."""
    report = Report("cpu", spoken_settings(settings))
    for (size, path), case in by_case(samples).items():
        for end in ("source", "target"):
            costs = [getattr(sample, end).total_s / (sample.moved_bytes / 1e9) for sample in case]
            system = [getattr(sample, end).system_s / (sample.moved_bytes / 1e9) for sample in case]
            labels = {"message": size_text(size), "path": path, "end": end}
            report.add("CPU time", "s/GB", costs, **labels)
            report.add("of it in the kernel", "s/GB", system, **labels)
    return report


REPORTS = {"hop": bandwidth_report, "cpu": cpu_report}
"""By the command that asks for them."""
