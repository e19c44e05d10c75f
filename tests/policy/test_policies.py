import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dualpath.policy import (
    BUILTIN_POLICIES,
    ClusterView,
    EngineView,
    ReadRequest,
    ReadShare,
    Role,
    load_policy,
    validate_plan,
)

PREFILL_ALONE = (ReadShare("p", "back"),)
DECODE_ALONE = (ReadShare("d", "front"),)
BOTH = (ReadShare("d", "front"), ReadShare("p", "back"))


def read_of(decode="d", hit_pages=100, page_bytes=1000, **fields):
    return ReadRequest(room=1, prefill="p", decode=decode, hit_pages=hit_pages, page_bytes=page_bytes, **fields)


def view_of(prefill=None, decode=None):
    return ClusterView(
        [
            EngineView(engine="p", role=Role.PREFILL, **(prefill or {})),
            EngineView(engine="d", role=Role.DECODE, **(decode or {})),
        ]
    )


def shares(name, read, view=None):
    return load_policy(name).plan(read, view or ClusterView()).shares


def test_prefill_reads_alone():
    assert shares("prefill", read_of()) == PREFILL_ALONE
    assert load_policy("prefill").needs_decode is False


def test_decode_reads_alone():
    assert shares("decode", read_of()) == DECODE_ALONE


@pytest.mark.parametrize("name", ["decode", "shorter_queue", "split"])
def test_prefill_reads_alone_while_decode_is_unknown(name):
    policy = load_policy(name)
    assert policy.needs_decode is True
    plan = policy.plan(read_of(decode=None), ClusterView())
    assert plan.shares == PREFILL_ALONE
    assert plan.reason == "decode engine unknown"


def test_shorter_queue_reads_on_decode_when_its_queue_is_shorter():
    assert (
        shares("shorter_queue", read_of(), view_of({"queued_read_bytes": 2}, {"queued_read_bytes": 1})) == DECODE_ALONE
    )


def test_shorter_queue_reads_on_prefill_when_its_queue_is_shorter():
    assert (
        shares("shorter_queue", read_of(), view_of({"queued_read_bytes": 1}, {"queued_read_bytes": 2})) == PREFILL_ALONE
    )


def test_shorter_queue_gives_a_tie_to_prefill():
    assert shares("shorter_queue", read_of(), view_of()) == PREFILL_ALONE


def test_shorter_queue_gives_a_tie_to_decode_that_holds_pages():
    assert shares("shorter_queue", read_of(decode_held_pages=3), view_of()) == DECODE_ALONE


def test_shorter_queue_counts_what_neighbours_on_the_node_read():
    view = ClusterView(
        [
            EngineView(engine="p", role=Role.PREFILL, node="n1"),
            EngineView(engine="p1", role=Role.PREFILL, node="n1", queued_read_bytes=10),
            EngineView(engine="d", role=Role.DECODE, node="n2", queued_read_bytes=5),
        ]
    )
    assert shares("shorter_queue", read_of(), view) == DECODE_ALONE


def test_shorter_queue_takes_an_engine_that_never_reported_as_idle():
    view = ClusterView([EngineView(engine="p", role=Role.PREFILL, queued_read_bytes=1)])
    assert shares("shorter_queue", read_of(), view) == DECODE_ALONE


FAST = {"read_bytes_per_s": 1e6, "hop_bytes_per_s": 1e6}


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ({}, FAST),
        ({"read_bytes_per_s": 1e9}, {}),
        ({"read_bytes_per_s": 1e9}, {"read_bytes_per_s": 1.0}),
        ({"read_bytes_per_s": 1e9}, {"hop_bytes_per_s": 1.0}),
        ({"read_bytes_per_s": 0.0}, FAST),
    ],
)
def test_split_shares_while_a_rate_is_unknown(prefill, decode):
    assert shares("split", read_of(), view_of(prefill, decode)) == BOTH


def test_split_shares_with_a_decode_engine_that_never_reported():
    view = ClusterView([EngineView(engine="p", role=Role.PREFILL, read_bytes_per_s=1e9)])
    assert shares("split", read_of(), view) == BOTH


def test_split_shares_a_read_of_many_chunks():
    assert shares("split", read_of(hit_pages=100, chunk_bytes=4000), view_of(FAST, FAST)) == BOTH


def test_split_leaves_a_read_of_one_chunk_to_an_idle_prefill_engine():
    assert shares("split", read_of(hit_pages=4, chunk_bytes=4000), view_of(FAST, FAST)) == PREFILL_ALONE


def test_split_shares_a_small_read_when_prefill_has_a_queue():
    busy = FAST | {"queued_read_bytes": 1_000_000}
    assert shares("split", read_of(hit_pages=4, chunk_bytes=4000), view_of(busy, FAST)) == BOTH


def test_split_shares_a_read_when_decode_has_a_long_queue():
    # Prefill helps to drain that queue, and a decode engine that comes too late claims nothing.
    busy = FAST | {"queued_read_bytes": 1_000_000}
    assert shares("split", read_of(hit_pages=100, chunk_bytes=4000), view_of(FAST, busy)) == BOTH


def test_split_always_shares_what_decode_holds_in_memory():
    read = read_of(hit_pages=4, chunk_bytes=4000, decode_held_pages=1)
    assert shares("split", read, view_of(FAST, FAST)) == BOTH


def test_split_counts_a_page_larger_than_a_chunk_as_one_chunk():
    read = read_of(hit_pages=2, page_bytes=10_000, chunk_bytes=4000)
    # Alone 20 ms; the first page from decode takes 10 ms to read and 10 ms to hop.
    assert shares("split", read, view_of(FAST, FAST)) == PREFILL_ALONE
    assert shares("split", read, view_of(FAST, FAST | {"hop_bytes_per_s": 2e6})) == BOTH


rates = st.none() | st.floats(min_value=0, max_value=1e12)
loads = st.fixed_dictionaries(
    {
        "queued_read_bytes": st.integers(0, 2**50),
        "read_bytes_per_s": rates,
        "hop_bytes_per_s": rates,
        "node": st.sampled_from(["", "n1", "n2"]),
    }
)
reads = st.builds(
    ReadRequest,
    room=st.integers(0, 2**63 - 1),
    prefill=st.just("p"),
    decode=st.sampled_from(["d", None]),
    hit_pages=st.integers(0, 10_000),
    page_bytes=st.integers(1, 2**30),
    decode_held_pages=st.integers(0, 10_000),
    deadline_s=st.floats(0, 1000),
)


@given(name=st.sampled_from(sorted(BUILTIN_POLICIES)), read=reads, prefill=loads, decode=loads)
def test_every_plan_is_valid_and_the_same_for_the_same_inputs(name, read, prefill, decode):
    view = view_of(prefill, decode)
    plan = validate_plan(load_policy(name).plan(read, view), read)
    assert {share.engine for share in plan.shares} <= {"p", read.decode}
    assert load_policy(name).plan(read, view) == plan
