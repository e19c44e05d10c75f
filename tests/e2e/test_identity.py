"""Token for token the same as stock SGLang, for every policy, in every state of the two caches."""

from __future__ import annotations

import random

import pytest

from benchmarks.testbed.metrics import metric_sum
from tests.e2e.conftest import Pair, References, kind_of, two_samples
from tests.e2e.counters import count
from tests.e2e.cover import rows
from tests.e2e.prompts import NEW_TOKENS, PAGE, Outputs, Prompts, ask, ask_all, differences

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(1200),
    pytest.mark.parametrize("pair", rows(), ids=str, indirect=True),
]
POLICIES = ("prefill", "decode", "shorter_queue", "split")


@pytest.fixture
def expected(pair: Pair, references: References) -> Outputs:
    return references.of(pair.row)


@pytest.fixture
def split(pair: Pair) -> Pair:
    pair.use_policy("split")
    return pair


def test_stock_agrees_with_itself(pair: Pair, references: References) -> None:
    references.of(pair.row)
    assert references.self_differences[kind_of(pair.row)] == 0


def test_outputs_are_those_of_stock_when_nothing_is_cached(split: Pair, prompts: Prompts, expected: Outputs) -> None:
    split.cluster.flush()
    assert differences(ask_all(split.cluster, prompts), expected) == {}


@pytest.mark.parametrize("policy", POLICIES)
def test_outputs_are_those_of_stock_when_all_comes_from_storage(
    pair: Pair, prompts: Prompts, expected: Outputs, policy: str
) -> None:
    pair.use_policy(policy)
    pair.cluster.flush()
    before = count(pair.cluster)
    assert differences(ask_all(pair.cluster, prompts), expected) == {}
    seen = count(pair.cluster).since(before)
    prefill, decode = seen.total("read_bytes_total", "prefill"), seen.total("read_bytes_total", "decode")
    if policy != "shorter_queue":  # with one request at a time the queues are equal, and prefill takes them all
        assert (decode > 0) == (policy != "prefill")
        # A busy machine may take a claim from its reader, which is counted.
        assert (prefill > 0) == (policy != "decode") or seen.total("fallbacks_total") > 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("flushed", ["decode", "prefill", "neither"])
def test_outputs_are_those_of_stock_when_one_side_holds_more(
    pair: Pair, prompts: Prompts, expected: Outputs, policy: str, flushed: str
) -> None:
    pair.use_policy(policy)
    some = {name: prompts[name] for name in list(prompts)[8::3] if len(prompts[name]) < 4000}
    ask_all(pair.cluster, some)
    if flushed != "neither":
        pair.cluster.flush(prefill=flushed == "prefill", decode=flushed == "decode")
    assert differences(ask_all(pair.cluster, some), expected) == {}


@pytest.mark.parametrize("policy", POLICIES)
def test_concurrent_requests_that_share_a_prefix(pair: Pair, prompts: Prompts, expected: Outputs, policy: str) -> None:
    pair.use_policy(policy)
    shared = {name: tokens for name, tokens in prompts.items() if name.startswith("shared")}
    pair.cluster.flush()
    assert differences(ask_all(pair.cluster, shared, at_once=6), expected) == {}


def test_a_longer_prompt_continues_a_stored_one(split: Pair, prompts: Prompts) -> None:
    """The decode side holds, after its own generation, what prefill never computed."""
    cluster = split.cluster
    start = prompts["length-1536"]
    answer = ask(cluster, start)
    longer = [*start, *answer, *prompts["length-200"]]
    plain = ask(cluster, longer)
    cluster.flush()
    assert ask(cluster, longer) == plain
    cluster.flush(decode=False)
    assert ask(cluster, longer) == plain


def test_streaming_gives_the_same_tokens(split: Pair, prompts: Prompts, expected: Outputs) -> None:
    split.cluster.flush()
    name = "length-1536"
    got = split.cluster.generate(input_ids=prompts[name], max_new_tokens=NEW_TOKENS, stream=True)
    assert got.output_ids == expected[name]


def test_a_cache_salt_keeps_its_own_pages(split: Pair, prompts: Prompts, expected: Outputs) -> None:
    name = "length-1025"
    split.cluster.flush()
    before = count(split.cluster)
    assert ask(split.cluster, prompts[name], cache_salt="one") == expected[name]
    fresh = count(split.cluster).since(before).total("read_bytes_total")
    split.cluster.flush()
    assert ask(split.cluster, prompts[name], cache_salt="one") == expected[name]
    again = count(split.cluster).since(before).total("read_bytes_total") - fresh
    if split.row.router == "mini_lb":  # the gateway drops fields that it does not know
        assert fresh == 0
    assert again > 0


def test_several_samples_of_one_prompt_end_as_with_stock(split: Pair, prompts: Prompts, references: References) -> None:
    """They share a room: SGLang 0.5.23 itself never answers them with PD disaggregation, and we are no different."""
    split.cluster.flush()
    assert two_samples(split.cluster, prompts["length-700"]) == references.samples[kind_of(split.row)]
    name = "length-1025"
    assert ask(split.cluster, prompts[name]) == references.of(split.row)[name]


def test_a_swapped_page_shows(split: Pair, prompts: Prompts, expected: Outputs) -> None:
    """Proof that the comparison would notice a wrong page: two pages of the store change places."""
    store = split.cluster.store
    assert store is not None
    if store.directory is None:
        return  # a Mooncake store cannot be edited from outside; the `file` rows do this
    name = "length-2100"
    split.cluster.flush()
    assert ask(split.cluster, prompts[name]) == expected[name]
    split.cluster.flush()
    files = sorted(path for path in store.directory.rglob("*") if path.is_file())
    contents = [path.read_bytes() for path in files]
    shifted = contents[1:] + contents[:1]
    try:
        for path, content in zip(files, shifted, strict=True):
            path.write_bytes(content)
        assert ask(split.cluster, prompts[name]) != expected[name]
    finally:
        for path, content in zip(files, contents, strict=True):
            path.write_bytes(content)
    split.cluster.flush()
    assert ask(split.cluster, prompts[name]) == expected[name]


def test_requests_with_nothing_to_load_wait_for_nothing(split: Pair) -> None:
    """Whatever waits until a deadline counts a fallback: here nothing may, and decode engines get a word at once."""
    cluster = split.cluster
    cluster.flush()
    source = random.Random(f"nothing-{split.row}")
    fresh = source.choices(range(256), k=700)
    before = count(cluster)
    answer = ask(cluster, fresh)  # nothing is stored of it
    assert ask(cluster, fresh) == answer  # all is in device memory
    cluster.flush()
    assert len(ask(cluster, fresh[:200])) == NEW_TOKENS  # what is stored of it is below SGLang's threshold
    seen = count(cluster).since(before)
    assert seen.total("fallbacks_total") == 0
    assert seen.total("read_bytes_total") == 0
    assert seen.total("offers_total", "none_no_hits") >= 1
    assert seen.total("offers_total", "none_below_threshold") >= 1


def test_all_read_bytes_are_hit_bytes(split: Pair, prompts: Prompts, expected: Outputs) -> None:
    """Read once: what both engines read together is what the prompt's pages weigh, not a page more."""
    name = "length-8300"
    split.cluster.flush()
    before = count(split.cluster)
    assert ask(split.cluster, prompts[name]) == expected[name]
    seen = count(split.cluster).since(before)
    pages = (len(prompts[name]) - 1) // PAGE
    # Each rank of an MLA model has the whole page, each of a GQA model its own heads of it.
    copies = split.row.tp_size if split.row.model == "mla" else 1
    page_bytes = split.cluster.kv_bytes_per_token * PAGE * copies
    reclaimed = seen.total("fallbacks_total", "lease_expired")
    if reclaimed == 0:  # a busy machine may take a claim from its reader, which is counted
        assert seen.total("read_bytes_total") == pages * page_bytes


def test_metrics_of_sglang_s_main_process_are_shown(split: Pair, prompts: Prompts) -> None:
    """They were not when prometheus_client was imported before SGLang had said how processes share their values."""
    cluster, tokens = split.cluster, prompts["length-700"]

    def counted() -> list[float]:
        return [metric_sum(cluster.metrics(name), "sglang:prompt_tokens_total") for name in cluster.names]

    before = counted()
    ask(cluster, tokens)
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [len(tokens)] * len(cluster.names)
