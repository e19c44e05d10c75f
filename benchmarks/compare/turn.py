"""One system's turn: servers up, contexts stored, caches dropped, requests played and counted, servers down."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.compare.sampler import Sampler, busy_share, busy_span_s
from benchmarks.compare.schema import Repetition, Samples, Settings, Sustained
from benchmarks.compare.sustained import search
from benchmarks.compare.systems import BASE_REQUESTS, is_dualpath, server_names, warm_up_agent, warm_up_requests
from benchmarks.compare.targets import Target
from benchmarks.load.measures import Record, latencies, median
from benchmarks.load.replay import Request, fill_requests_of, make_request, play_offline, play_poisson, requests_of
from benchmarks.load.workload import Workload
from benchmarks.testbed import RequestError, metric_sum

_FILL_IN_FLIGHT = 2
_SETTLE_S = 0.5  # the last packets of the last request
_LEAST_READ_SHARE = 0.1  # of a link's rate, that counts as reading when one request is alone

Say = Callable[[str], None]


@dataclass
class Turns:
    """The turns of one system: the first one also fills its store."""

    system: str
    target: Target
    settings: Settings
    workload: Workload
    say: Say
    filled: bool = False

    def play(self, number: int, *, keep: bool) -> Repetition:
        """Measure once; `keep` leaves the servers up. Raises TestbedError when servers or set-up requests fail."""
        start_s = self._prepare(number)
        base_ttft_s = self._warm_up(number)
        probed = self.target.probe_bytes_per_s()
        agents = [
            requests
            for number_of_pass in range(self.settings.passes)
            for requests in requests_of(self.workload, f"{number}.{number_of_pass}")
        ]
        counted, fallbacks = self._counted_read_bytes(), self._fallbacks()
        token_times = self._token_times()
        before = self.target.link_bytes()
        sampler = Sampler(self.target.counters(), every_s=self.settings.sample_s, groups=self.target.process_groups())
        sampler.start()
        zero = time.perf_counter()
        try:
            records, windows_s = self._load(agents, number, zero)
            time.sleep(_SETTLE_S)
        finally:
            samples = sampler.stop(zero)
        after = self.target.link_bytes()
        counted = {name: value - counted[name] for name, value in self._counted_read_bytes().items()}
        fallbacks = self._fallbacks() - fallbacks
        seconds, tokens = (now - then for now, then in zip(self._token_times(), token_times, strict=True))
        itl_mean_s = seconds / tokens if tokens else None
        self.target.flush()
        written = _added(self.target.link_bytes(), before)
        if not keep:
            self.target.suspend()
        self._set_read_times(records, samples, probed, base_ttft_s)
        measured = latencies(records)
        measured.itl_mean_s = itl_mean_s
        if len(windows_s) > 1:  # dropping caches between rounds is not the job's time
            measured.jct_s = sum(end - begin for begin, end in windows_s)
            tokens = sum(record.prompt_tokens + record.output_tokens for record in records if record.error is None)
            measured.throughput_tokens_per_s = tokens / measured.jct_s if measured.jct_s else 0.0
        carried = _added(after, before)
        return Repetition(
            system=self.system,
            number=number,
            records=records,
            measured=measured,
            windows_s=windows_s,
            samples=samples,
            link_bytes=carried,
            probe_bytes_per_s=probed,
            snic_busy={name: busy_share(samples, f"{name}/storage/rx", windows_s, rate)
                       for name, rate in probed.items()},
            hit_tokens=sum(record.cached_tokens for record in records),
            read_bytes=_sum_of(carried, self.target.names, "storage/rx"),
            counted_read_bytes=counted,
            written_bytes=_sum_of(written, self.target.names, "storage/tx"),
            cpu_busy=_mean_busy(samples, windows_s),
            base_ttft_s=base_ttft_s,
            failed=self._failed(agents, records),
            start_s=start_s,
            fallbacks=dict(fallbacks),
        )  # fmt: skip

    def sustained(self) -> Sustained:
        """The largest rate of agents at which the SLO holds; servers are down afterwards."""
        self._prepare(0)
        self._warm_up(0)

        def play_at(agents_per_s: float, trial: int) -> list[Record]:
            self.say(f"{self.system}: trial {trial + 1}, {agents_per_s:.3f} agents/s")
            records = []
            for wave in range(self.settings.passes):
                self.target.flush()  # so that every wave's hits come from storage
                agents = requests_of(self.workload, f"trial{trial}.{wave}")
                seed = self.settings.seed + wave
                records += play_poisson(self.target.router_url, agents, agents_per_s=agents_per_s, seed=seed)
            return records

        found = search(
            play_at, slo=self.settings.slo, highest_per_s=1.25 * self._reads_per_s(), steps=self.settings.trial_steps
        )
        self.target.flush()
        self.target.suspend()
        return found

    def _prepare(self, number: int) -> float:
        start = time.monotonic()
        self.target.resume()
        took_s = time.monotonic() - start
        self.target.set_shaped(False)
        if not self.filled:
            fills = fill_requests_of(self.workload)
            begin = time.monotonic()
            self._send(fills, in_flight=_FILL_IN_FLIGHT)
            self.target.flush()
            self.say(f"{self.system}: {len(fills)} contexts stored in {time.monotonic() - begin:.0f} s")
            self.filled = True
        self.say(f"{self.system}: repetition {number + 1} of {self.settings.repetitions}, servers up")
        return took_s

    def _warm_up(self, number: int) -> float | None:
        """Requests that are not measured, through every server; median time to first token of those that load nothing.

        These come again with other ends after the same context was served, so that their prefix is in the prefill
        server's memory. Then caches are dropped, except the oracle's, which first gets every context.
        """
        servers = max(self.settings.prefill_servers, self.settings.decode_servers)
        agent = warm_up_agent(self.workload)
        first = self.workload.trajectories[agent].rounds[0]
        requests = [
            make_request(0, 0, self.workload.prompt_ids(agent, 0, f"warm{number}.{index}"), first.generated_tokens)
            for index in range(warm_up_requests(self.settings))
        ]
        self._send(requests[:servers], in_flight=1)  # loads the context into every server
        if self.system == "oracle":
            self._send(fill_requests_of(self.workload), in_flight=_FILL_IN_FLIGHT)
        self.target.set_shaped(True)
        records = self._send(requests[servers:], in_flight=1)
        if self.system != "oracle":
            self.target.flush()
        return median([record.ttft_s for record in records[-BASE_REQUESTS:] if not record.cached_storage_tokens])

    def _send(self, requests: Sequence[Request], *, in_flight: int) -> list[Record]:
        """Set-up requests, which have to succeed: raises RequestError."""
        records = play_offline(self.target.router_url, [[request] for request in requests], in_flight=in_flight)
        for record in records:
            if record.error is not None:
                raise RequestError(f"{self.system}: a set-up request failed: {record.error}")
        return records

    def _load(
        self, agents: list[list[Request]], number: int, zero: float
    ) -> tuple[list[Record], list[tuple[float, float]]]:
        """Play everything; caches are dropped between rounds, so that each round's hits come from storage."""
        url = self.target.router_url
        if self.settings.mode == "poisson":
            begin_s = time.perf_counter() - zero
            rate = self.settings.load * self._reads_per_s()
            records = play_poisson(url, agents, agents_per_s=rate, seed=self.settings.seed + number)
            return _moved(records, begin_s), [(begin_s, time.perf_counter() - zero)]
        all_records: list[Record] = []
        windows_s = []
        lost: set[int] = set()
        played_rounds = max(len(requests) for requests in agents)
        for index in range(played_rounds):
            if index and self.system != "oracle":
                self.target.flush()
            wave = [requests[index : index + 1] for requests in agents if requests[0].agent not in lost]
            begin_s = time.perf_counter() - zero
            records = play_offline(url, wave, in_flight=self.settings.in_flight)
            windows_s.append((begin_s, time.perf_counter() - zero))
            all_records += _moved(records, begin_s)
            lost |= {record.agent for record in records if record.error is not None}
        return all_records, windows_s

    def _reads_per_s(self) -> float:
        """Requests per second whose reads fill the storage links of all servers."""
        mbit = self.settings.snic_mbit
        if mbit is None:
            raise RequestError("Reads at a share of the links need links of a limited rate: set --snic-mbit.")
        hits = self.workload.total_hit_tokens(self.settings.page_tokens) / self.workload.requests
        return len(self.target.names) * mbit * 1e6 / 8 / max(1.0, hits * self.settings.kv_bytes_per_token)

    def _set_read_times(
        self, records: Sequence[Record], samples: Samples, probed: dict[str, float], base_ttft_s: float | None
    ) -> None:
        links = [f"{name}/storage/rx" for name in self.target.names]
        for record in records:
            if record.error is not None or record.first_s is None:
                continue
            if self.settings.in_flight == 1 and self.settings.mode == "offline" and probed:
                least = _LEAST_READ_SHARE * min(probed.values())
                record.read_s = busy_span_s(samples, links, record.sent_s, record.first_s, least)
            elif base_ttft_s is not None:
                record.read_s = max(0.0, record.first_s - record.sent_s - base_ttft_s)

    def _counted_read_bytes(self) -> dict[str, int]:
        if not is_dualpath(self.system):
            return {}
        return {name: round(metric_sum(self.target.metrics(name), "sglang_dualpath_read_bytes_total"))
                for name in self.target.names}  # fmt: skip

    def _token_times(self) -> tuple[float, float]:
        """Sum of the times between tokens, and their number, over all decode servers so far."""
        metrics = [self.target.metrics(name) for name in self.target.names if name.startswith("decode")]
        what = "sglang:inter_token_latency_seconds_"
        seconds, tokens = (sum(metric_sum(one, what + part) for one in metrics) for part in ("sum", "count"))
        return seconds, tokens

    def _fallbacks(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        if is_dualpath(self.system):
            for name in self.target.names:
                for (metric, labels), value in self.target.metrics(name).items():
                    if metric == "sglang_dualpath_fallbacks_total":
                        counts[dict(labels)["reason"]] += round(value)
        return counts

    @staticmethod
    def _failed(agents: Sequence[Sequence[Request]], records: Sequence[Record]) -> int:
        """Requests that failed, or were never sent because one before them failed."""
        wanted = sum(len(requests) for requests in agents)
        return wanted - sum(1 for record in records if record.error is None)


def read_time_method(settings: Settings) -> str:
    """How `read_s` of a record came about, in a sentence for the report."""
    if settings.in_flight == 1 and settings.mode == "offline" and settings.namespaces:
        return "a request's read time is the time in which a storage link carried data for it (it was alone)"
    return (
        "a request's read time is its TTFT less the median TTFT of requests on the same servers that were alone and "
        "found their whole context in the prefill server's memory"
    )


def storage_readers(system: str, settings: Settings) -> list[str]:
    """Servers whose storage links a system can read a request's hits through for good."""
    prefill = server_names("prefill", settings.prefill_servers)
    decode = server_names("decode", settings.decode_servers)
    if system == "oracle":
        return []
    if system == "dualpath:decode":
        return decode
    if system == "dualpath:prefill" or not is_dualpath(system):
        return prefill
    return prefill + decode


def _moved(records: list[Record], by_s: float) -> list[Record]:
    for record in records:
        record.sent_s += by_s
        for name in ("first_s", "second_s", "last_s"):
            value = getattr(record, name)
            if value is not None:
                setattr(record, name, value + by_s)
    return records


def _added(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: value - before.get(name, 0) for name, value in after.items()}


def _sum_of(carried: dict[str, int], names: Sequence[str], what: str) -> int | None:
    found = [carried[f"{name}/{what}"] for name in names if f"{name}/{what}" in carried]
    return sum(found) if found else None


def _mean_busy(samples: Samples, windows_s: Sequence[tuple[float, float]]) -> float:
    inside = [busy for at, busy in zip(samples.times_s[1:], samples.cpu_busy[1:], strict=True)
              if any(begin <= at <= end for begin, end in windows_s)]  # fmt: skip
    return sum(inside) / len(inside) if inside else 0.0
