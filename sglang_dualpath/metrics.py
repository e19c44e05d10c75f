"""Counters and gauges of DualPath, in prometheus_client's default registry, next to SGLang's own.

    metrics.READ_BYTES.add(4096, engine_role="decode", path="storage")
    metrics.RESERVE_SLOTS.set(12, state="free")

Each metric is made at its first use, and prometheus_client imported only then: when it is imported, it decides for
good whether it shares its values between processes (PROMETHEUS_MULTIPROC_DIR), and SGLang sets that variable after
plugins were loaded.

Counting never fails a request: a registry or file that cannot be written is logged once per metric, and `snapshot`
goes on.
"""

from __future__ import annotations

import abc
import logging
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from prometheus_client.metrics import MetricWrapperBase

logger = logging.getLogger(__name__)

PREFIX: Final = "sglang_dualpath_"

_all: list[_Metric] = []


class _Metric(abc.ABC):
    """A metric of given label names and this process's own values of it. Thread-safe."""

    def __init__(self, name: str, documentation: str, labels: tuple[str, ...] = ()) -> None:
        self.name = PREFIX + name
        self.labels = labels
        self._documentation = documentation
        self._lock = threading.Lock()
        self._values: dict[tuple[str, ...], float] = {}
        self._exported: Any = None  # prometheus_client's metric; its children differ in what they can do
        self._broken = False
        _all.append(self)

    def value(self, **labels: str) -> float:
        """This process's value; 0 if there was none yet."""
        key = self._key(labels)
        with self._lock:
            return self._values.get(key, 0.0)

    def snapshot(self) -> dict[str, float]:
        """This process's values by `name{label="value"}`, as in the exposition format."""
        with self._lock:
            values = dict(self._values)
        return {self._sample_name(key): value for key, value in sorted(values.items())}

    @abc.abstractmethod
    def _create(self) -> MetricWrapperBase:
        """Makes the metric in the default registry; ValueError if the name is taken."""

    def _key(self, labels: dict[str, str]) -> tuple[str, ...]:
        if labels.keys() != set(self.labels):
            raise ValueError(f"{self.name} has the labels {self.labels}, not {tuple(labels)}.")
        return tuple(str(labels[label]) for label in self.labels)

    def _sample_name(self, key: tuple[str, ...]) -> str:
        if not key:
            return self.name
        pairs = ",".join(f'{label}="{value}"' for label, value in zip(self.labels, key, strict=True))
        return f"{self.name}{{{pairs}}}"

    def _child(self, key: tuple[str, ...]) -> Any:
        """With the lock held: prometheus_client's child of these label values, or None if it has failed before."""
        if self._broken:
            return None
        if self._exported is None:
            self._exported = self._create_or_find()
        return self._exported.labels(*key) if key else self._exported

    def _create_or_find(self) -> Any:
        try:
            return self._create()
        except ValueError:
            # Made before under this name, by an earlier import of this module. There is no public way to look it up.
            from prometheus_client import REGISTRY

            existing = REGISTRY._names_to_collectors.get(self.name)
            if existing is None or getattr(existing, "_labelnames", None) != self.labels:
                raise
            return existing

    def _give_up(self) -> None:
        """With the lock held, in an except clause."""
        self._broken = True
        logger.warning("%s cannot be exported from this process", self.name, exc_info=True)


class Counter(_Metric):
    """Only grows; summed over processes."""

    def add(self, amount: float = 1, **labels: str) -> None:
        """Adds `amount` >= 0. Raises ValueError for a negative one or for other labels than the metric has."""
        key = self._key(labels)
        if not amount >= 0:
            raise ValueError(f"{self.name} cannot go down by {amount}.")
        with self._lock:
            self._values[key] = self._values.get(key, 0.0) + amount
            try:
                child = self._child(key)
                if child is not None:
                    child.inc(amount)
            except Exception:
                self._give_up()

    def _create(self) -> MetricWrapperBase:
        from prometheus_client import Counter as PrometheusCounter

        return PrometheusCounter(self.name, self._documentation, self.labels)


class Gauge(_Metric):
    """Goes up and down; summed over the processes that live."""

    def set(self, value: float, **labels: str) -> None:
        """Sets this process's value. Raises ValueError for other labels than the metric has."""
        key = self._key(labels)
        with self._lock:
            self._values[key] = float(value)
            try:
                child = self._child(key)
                if child is not None:
                    child.set(value)
            except Exception:
                self._give_up()

    def _create(self) -> MetricWrapperBase:
        from prometheus_client import Gauge as PrometheusGauge

        return PrometheusGauge(self.name, self._documentation, self.labels, multiprocess_mode="livesum")


READ_BYTES = Counter("read_bytes_total", "Bytes of KV cache read from storage, by read path.", ("engine_role", "path"))
PUSHED_BYTES = Counter("pushed_bytes_total", "Bytes that readers sent over the compute network.", ("engine_role",))
RECEIVED_BYTES = Counter("received_bytes_total", "Bytes that other engines landed in this engine's host memory.")
WRITTEN_BACK_BYTES = Counter("written_back_bytes_total", "Bytes of KV cache written to storage.")
REQUESTS = Counter("requests_total", "Requests, by how their read ended.", ("outcome",))
PARKED = Counter(
    "parked_total", "Reads whose prefetch found no room and was tried again, once each.", ("engine_role", "reason")
)
FALLBACKS = Counter(
    "fallbacks_total",
    "Reads that went on without a reader, chunks that came late, reads and write-backs on the stock path, pushes whose "
    "end NIXL does not tell, engines that could not be published.",
    ("reason",),
)
READ_QUEUE_BYTES = Gauge("read_queue_bytes", "Bytes that wait to be read from storage.")
RESERVE_SLOTS = Gauge("reserve_slots", "Spare host pages: free, backing open claims, or in quarantine.", ("state",))
OFFERS = Counter("offers_total", "Answers of prefill engines to decode engines.", ("outcome",))
CLAIMS = Counter("claims_total", "Claims of chunks, by how they ended.", ("outcome",))
CONTROL_ERRORS = Counter("control_errors_total", "Faults on the control sockets.", ("kind",))


def snapshot() -> dict[str, float]:
    """Every value that this process has counted or set, by `name{label="value"}`."""
    return {name: value for metric in _all for name, value in metric.snapshot().items()}
