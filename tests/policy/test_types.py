import msgspec
import pytest

from sglang_dualpath.policy import (
    ClusterView,
    EngineView,
    ReadPlan,
    ReadRequest,
    ReadShare,
    Role,
    prefill_alone,
    validate_plan,
)

READ = ReadRequest(room=7, prefill="p0", decode="d0", hit_pages=10, page_bytes=100)


def view_of(engine, role=Role.PREFILL, **fields):
    return EngineView(engine=engine, role=role, **fields)


def test_view_finds_engines_by_name_and_role():
    first, second = view_of("p0"), view_of("d0", Role.DECODE)
    view = ClusterView([first, second])
    assert view.get("p0") is first
    assert view.get("nobody") is None
    assert view.of_role(Role.DECODE) == (second,)
    assert view.of_role(Role.HELPER) == ()
    assert "'d0'" in repr(view)


def test_view_cannot_be_changed():
    view = ClusterView([view_of("p0")])
    with pytest.raises(TypeError):
        view.engines["p1"] = view_of("p1")  # type: ignore[index]
    with pytest.raises(AttributeError):
        view.engines["p0"].queued_read_bytes = 1


def test_view_refuses_two_views_of_one_engine():
    with pytest.raises(ValueError, match="two views of engine 'p0'"):
        ClusterView([view_of("p0"), view_of("p0")])


def test_engines_of_one_node_share_its_queue():
    view = ClusterView(
        [
            view_of("p0", node="n", queued_read_bytes=1),
            view_of("p1", node="n", queued_read_bytes=2),
            view_of("p2", node="m", queued_read_bytes=4),
        ]
    )
    assert view.queued_read_bytes("p0") == 3
    assert view.queued_read_bytes("p2") == 4


def test_engines_without_a_node_queue_for_themselves():
    view = ClusterView([view_of("p0", queued_read_bytes=1), view_of("p1", queued_read_bytes=2)])
    assert view.queued_read_bytes("p1") == 2
    assert view.queued_read_bytes("nobody") == 0


def test_plan_finds_the_share_of_an_engine():
    plan = prefill_alone(READ, "why")
    assert plan.share_of("p0") == ReadShare("p0", "back")
    assert plan.share_of("d0") is None


def test_valid_plan_is_returned():
    plan = ReadPlan((ReadShare("d0", "front", 4), ReadShare("p0", "back"), ReadShare("h", "any")), "why")
    assert validate_plan(plan, READ) is plan


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ((), "names no reader"),
        ((ReadShare("p0", "back"), ReadShare("p0", "front")), "names 'p0' twice"),
        ((ReadShare("p0", "back", 0),), "limits 'p0' to 0 pages"),
        ((ReadShare("d0", "back"),), "cannot keep a prefix"),
    ],
)
def test_plan_that_cannot_be_carried_out_is_refused(shares, sentence):
    with pytest.raises(ValueError, match=sentence):
        validate_plan(ReadPlan(shares, "why"), READ)


def test_inputs_survive_a_recording():
    assert msgspec.json.decode(msgspec.json.encode(READ), type=ReadRequest) == READ
    engine = view_of("p0", read_bytes_per_s=1.5)
    assert msgspec.json.decode(msgspec.json.encode(engine), type=EngineView) == engine
