"""What the decode benchmark makes of a token stream and of its phases."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.micro.decode import DecodeSettings, Phase, Stream, gaps_between, summarize
from benchmarks.micro.errors import BenchmarkError

PAYLOAD = 100_000_000


class _Handler(BaseHTTPRequestHandler):
    """Streams as SGLang does: every event names all tokens so far. Without end, as a long answer."""

    events: tuple[str, ...] = ()

    def do_POST(self) -> None:
        self.send_response(200)
        self.end_headers()
        for event in self.events:
            self.wfile.write(f"data: {event}\n\n".encode())
        try:
            while self.events and "error" not in self.events[-1]:
                time.sleep(0.01)
                self.wfile.write(b": still here\n\n")
        except OSError:
            return

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    serving = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{serving.server_address[1]}"
    serving.shutdown()
    thread.join()
    serving.server_close()


def test_a_stream_notes_every_token_and_can_be_ended(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    events = tuple(json.dumps({"output_ids": [1] * count}) for count in (1, 2, 4))
    monkeypatch.setattr(_Handler, "events", events)
    stream = Stream(server, [1, 2, 3], 100)
    deadline_s = time.monotonic() + 10
    while len(stream.token_times_s) < 4 and time.monotonic() < deadline_s:
        time.sleep(0.005)
    stream.end()
    assert len(stream.token_times_s) == 4
    assert not stream.finished
    assert stream.fault is None


def test_a_stream_without_a_token_is_reported(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Handler, "events", (json.dumps({"error": "no room"}),))
    with pytest.raises(BenchmarkError, match="no room"):
        Stream(server, [1], 100)


def test_only_gaps_inside_the_window_count() -> None:
    tokens, seconds, gaps = gaps_between([0.0, 1.0, 1.5, 3.0, 9.0], 0.5, 4.0)
    assert (tokens, seconds) == (2, 2.0)
    assert gaps == (0.5, 1.5)
    with pytest.raises(BenchmarkError, match="nothing to measure"):
        gaps_between([0.0, 1.0], 0.5, 4.0)


def phase(name: str, tpot_ms: float, prefill: float, decode: float) -> Phase:
    return Phase(name, tpot_ms / 1e3 * 10, 10, (tpot_ms / 1e3,) * 10, {"prefill": prefill, "decode": decode})


def test_tpot_is_compared_by_medians() -> None:
    phases = [phase("idle", value, 0, 0) for value in (10, 20, 90)]
    phases += [phase("prefill", value, PAYLOAD, 0) for value in (20, 40, 41)]
    phases += [phase("split", value, PAYLOAD / 2, PAYLOAD / 2) for value in (50, 50, 1)]
    report = summarize(DecodeSettings(), phases, PAYLOAD)
    values = {ratio.name: ratio.value for ratio in report.ratios}
    assert values == {
        "TPOT split/prefill": pytest.approx(1.25),
        "TPOT split/idle": pytest.approx(2.5),
        "TPOT prefill/idle": pytest.approx(2.0),
    }


@pytest.mark.parametrize(
    ("name", "prefill", "decode"), [("idle", 1, 0), ("prefill", PAYLOAD, 1), ("prefill", 0, 0), ("split", PAYLOAD, 0)]
)
def test_a_phase_that_was_not_what_its_name_says_is_refused(name: str, prefill: float, decode: float) -> None:
    good = {
        "idle": phase("idle", 10, 0, 0),
        "prefill": phase("prefill", 10, PAYLOAD, 0),
        "split": phase("split", 10, PAYLOAD / 2, PAYLOAD / 2),
    }
    with pytest.raises(BenchmarkError, match=f"A phase called {name} read"):
        summarize(DecodeSettings(), [*({**good, name: phase(name, 10, prefill, decode)}).values()], PAYLOAD)
