"""Reading counters and answers of servers, without servers."""

from __future__ import annotations

import httpx
import pytest

from benchmarks.testbed.client import Client, greedy_payload
from benchmarks.testbed.errors import RequestError
from benchmarks.testbed.metrics import difference, metric_sum, parse_metrics

PAGE = """\
# HELP sglang_dualpath_read_bytes_total Bytes
# TYPE sglang_dualpath_read_bytes_total counter
sglang_dualpath_read_bytes_total{engine_role="decode",path="decode"} 4096.0
sglang_dualpath_read_bytes_total{engine_role="decode",path="prefill"} 1.0
# HELP sglang:cached_tokens_total Tokens
# TYPE sglang:cached_tokens_total counter
sglang:cached_tokens_total{model_name="a b\\"c"} 12
"""


def client_of(handler: httpx.MockTransport) -> Client:
    client = Client("http://server")
    client.close()
    client._http = httpx.Client(base_url="http://server", transport=handler)
    return client


def answer(**meta: object) -> dict[str, object]:
    return {"output_ids": [5, 6], "meta_info": {"finish_reason": {"type": "length"}, **meta}}


def test_samples_are_keyed_by_name_and_labels() -> None:
    metrics = parse_metrics(PAGE)
    labels = frozenset({("engine_role", "decode"), ("path", "decode")})
    assert metrics["sglang_dualpath_read_bytes_total", labels] == 4096.0
    assert metrics["sglang:cached_tokens_total", frozenset({("model_name", 'a b"c')})] == 12.0


def test_a_sum_takes_all_samples_with_the_labels_asked_for() -> None:
    metrics = parse_metrics(PAGE)
    assert metric_sum(metrics, "sglang_dualpath_read_bytes_total") == 4097.0
    assert metric_sum(metrics, "sglang_dualpath_read_bytes_total", path="prefill") == 1.0
    assert metric_sum(metrics, "no_such_metric") == 0.0


def test_a_counter_that_was_not_there_before_counts_from_zero() -> None:
    after = parse_metrics(PAGE)
    assert difference(after, {}) == after


def test_a_generation_carries_tokens_and_hits() -> None:
    client = client_of(httpx.MockTransport(lambda _: httpx.Response(200, json=answer(cached_tokens=64))))
    generation = client.generate(greedy_payload([1, 2], 2))
    client.close()
    assert generation.output_ids == (5, 6)
    assert generation.cached_tokens == 64


def test_a_streamed_generation_is_its_last_event() -> None:
    stream = (
        b'data: {"output_ids": [5], "meta_info": {}}\n\ndata: {"output_ids": [5, 6], "meta_info": {}}\n\ndata: [DONE]\n'
    )
    client = client_of(httpx.MockTransport(lambda _: httpx.Response(200, content=stream)))
    generation = client.generate(greedy_payload([1, 2], 2), stream=True)
    client.close()
    assert generation.output_ids == (5, 6)
    assert generation.ttft_s <= generation.total_s


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.Response(500, text="out of pages"), "500: out of pages"),
        (httpx.Response(200, json={"error": "x"}), "something else"),
        (
            httpx.Response(
                200, json={"output_ids": [], "meta_info": {"finish_reason": {"type": "abort", "message": "lost"}}}
            ),
            "aborted: lost",
        ),
    ],
)
def test_a_failed_generation_raises(response: httpx.Response, message: str) -> None:
    client = client_of(httpx.MockTransport(lambda _: response))
    with pytest.raises(RequestError, match=message):
        client.generate(greedy_payload([1], 1))
    client.close()


def test_an_error_inside_a_stream_raises() -> None:
    stream = b'data: {"error": {"message": "gone"}}\n\n'
    client = client_of(httpx.MockTransport(lambda _: httpx.Response(200, content=stream)))
    with pytest.raises(RequestError, match="gone"):
        client.generate(greedy_payload([1], 1), stream=True)
    client.close()


def test_no_answer_raises() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    client = client_of(httpx.MockTransport(refuse))
    with pytest.raises(RequestError, match="no answer"):
        client.post("/flush_cache")
    client.close()
