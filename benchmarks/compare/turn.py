"""One system's turn: servers up, contexts stored, caches dropped, requests played and counted, servers down."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.compare.sampler import busy_span_s
from benchmarks.compare.schema import Repetition, Samples, Settings, Sustained, Trial
from benchmarks.compare.sustained import can_hold, judged, search
from benchmarks.compare.systems import BASE_REQUESTS, policy_of, server_names, warm_up_agent, warm_up_requests
from benchmarks.compare.targets import Target
from benchmarks.compare.watch import Seen, Watch, Windows, added
from benchmarks.load.measures import Latencies, Record, latencies, median
from benchmarks.load.replay import Request, fill_requests_of, make_request, play_offline, play_poisson, requests_of
from benchmarks.load.workload import Workload
from benchmarks.testbed import RequestError

_FILL_IN_FLIGHT = 2
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
        watch = Watch(self.system, self.target, sample_s=self.settings.sample_s)
        try:
            records, windows_s = self._load(agents, number, watch)
        except BaseException:
            watch.abandon()
            raise
        seen = watch.stop()
        self.target.flush()
        written = added(self.target.link_bytes(), watch.link_bytes_before)
        if not keep:
            self.target.suspend()
        return Repetition(
            system=self.system,
            number=number,
            records=records,
            measured=self._measured(records, windows_s, seen, probed, base_ttft_s),
            windows_s=windows_s,
            samples=seen.samples,
            link_bytes=seen.link_bytes,
            probe_bytes_per_s=probed,
            snic_busy=seen.snic_busy(probed, windows_s),
            hit_tokens=sum(record.cached_tokens for record in records),
            read_bytes=_sum_of(seen.link_bytes, self.target.names, "storage/rx"),
            counted_read_bytes=seen.counted_read_bytes,
            written_bytes=_sum_of(written, self.target.names, "storage/tx"),
            cpu_busy=seen.cpu_busy(windows_s),
            core_busy=seen.core_busy(windows_s),
            base_ttft_s=base_ttft_s,
            failed=self._failed(agents, records),
            start_s=start_s,
            fallbacks=seen.fallbacks,
        )

    def sustained(self) -> Sustained:
        """The largest rate of agents at which the SLO holds; servers are down afterwards.

        Not searched above what the storage links that the system may read through carry: a wave of a few agents is
        over before the queue of such a rate shows.
        """
        self._prepare(0)
        base_ttft_s = self._warm_up(0)
        probed = self.target.probe_bytes_per_s()

        def play_at(agents_per_s: float, trial: int) -> Trial:
            self.say(f"{self.system}: trial {trial + 1}, {agents_per_s:.3f} agents/s")
            records: list[Record] = []
            windows_s = []
            watch = Watch(self.system, self.target, sample_s=self.settings.sample_s)
            try:
                for wave in range(self.settings.passes):
                    self.target.flush()  # so that every wave's hits come from storage
                    agents = requests_of(self.workload, f"trial{trial}.{wave}")
                    seed = self.settings.seed + wave
                    begin_s = watch.now_s
                    played = play_poisson(self.target.router_url, agents, agents_per_s=agents_per_s, seed=seed)
                    windows_s.append((begin_s, watch.now_s))
                    records += _moved(played, begin_s)
                    if not can_hold(records, self.settings.passes * self.workload.requests, self.settings.slo):
                        break  # a low rate takes minutes a wave
            except BaseException:
                watch.abandon()
                raise
            seen = watch.stop()
            found = judged(agents_per_s, records, self.settings.slo)
            found.measured = self._measured(records, windows_s, seen, probed, base_ttft_s)
            found.snic_busy = seen.snic_busy(probed, windows_s)
            found.link_bytes = seen.link_bytes
            found.cpu_busy = seen.cpu_busy(windows_s)
            found.fallbacks = seen.fallbacks
            return found

        links = len(storage_readers(self.system, self.settings))
        found = search(play_at, highest_per_s=links * self._reads_per_s_and_link(), steps=self.settings.trial_steps)
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
        self, agents: list[list[Request]], number: int, watch: Watch
    ) -> tuple[list[Record], list[tuple[float, float]]]:
        """Play everything; caches are dropped between rounds, so that each round's hits come from storage."""
        url = self.target.router_url
        if self.settings.mode == "poisson":
            begin_s = watch.now_s
            rate = self.settings.load * len(self.target.names) * self._reads_per_s_and_link()
            records = play_poisson(url, agents, agents_per_s=rate, seed=self.settings.seed + number)
            return _moved(records, begin_s), [(begin_s, watch.now_s)]
        all_records: list[Record] = []
        windows_s = []
        lost: set[int] = set()
        played_rounds = max(len(requests) for requests in agents)
        for index in range(played_rounds):
            if index and self.system != "oracle":
                self.target.flush()
            wave = [requests[index : index + 1] for requests in agents if requests[0].agent not in lost]
            begin_s = watch.now_s
            records = play_offline(url, wave, in_flight=self.settings.in_flight)
            windows_s.append((begin_s, watch.now_s))
            all_records += _moved(records, begin_s)
            lost |= {record.agent for record in records if record.error is not None}
        return all_records, windows_s

    def _reads_per_s_and_link(self) -> float:
        """Requests per second whose reads fill one storage link."""
        mbit = self.settings.snic_mbit
        if mbit is None:
            raise RequestError("Reads at a share of the links need links of a limited rate: set --snic-mbit.")
        hits = self.workload.total_hit_tokens(self.settings.page_tokens) / self.workload.requests
        return mbit * 1e6 / 8 / max(1.0, hits * self.settings.kv_bytes_per_token)

    def _measured(
        self, records: Sequence[Record], windows_s: Windows, seen: Seen, probed: dict[str, float],
        base_ttft_s: float | None,
    ) -> Latencies:  # fmt: skip
        """Of all requests, whose read times are set; time between windows, in which caches are dropped, is no job's."""
        self._set_read_times(records, seen.samples, probed, base_ttft_s)
        measured = latencies(records)
        measured.itl_mean_s = seen.itl_mean_s
        if len(windows_s) > 1:
            measured.jct_s = sum(end - begin for begin, end in windows_s)
            tokens = sum(record.prompt_tokens + record.output_tokens for record in records if record.error is None)
            measured.throughput_tokens_per_s = tokens / measured.jct_s if measured.jct_s else 0.0
        return measured

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
    policy = policy_of(system)
    if policy == "decode":
        return decode
    if policy == "prefill" or policy is None:
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


def _sum_of(carried: dict[str, int], names: Sequence[str], what: str) -> int | None:
    found = [carried[f"{name}/{what}"] for name in names if f"{name}/{what}" in carried]
    return sum(found) if found else None
