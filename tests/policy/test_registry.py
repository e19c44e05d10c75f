import sys
import types
from importlib.metadata import EntryPoint

import pytest

from sglang_dualpath.policy import (
    BUILTIN_POLICIES,
    BalancingPolicy,
    PolicyError,
    UnknownPolicyError,
    known_policies,
    load_policy,
    prefill_alone,
    registry,
)


class MyPolicy:
    needs_decode = False

    def plan(self, read, view):
        return prefill_alone(read, "mine")


class NeedsArguments(MyPolicy):
    def __init__(self, argument):
        self.argument = argument


class NoPolicy:
    needs_decode = True
    plan = None


@pytest.fixture(autouse=True)
def _third_party(monkeypatch):
    module = types.ModuleType("third_party")
    module.MyPolicy, module.NeedsArguments, module.NoPolicy = MyPolicy, NeedsArguments, NoPolicy
    module.not_a_class = 1
    monkeypatch.setitem(sys.modules, "third_party", module)


def offer(monkeypatch, **points):
    found = [EntryPoint(name, value, registry.ENTRY_POINT_GROUP) for name, value in points.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)


@pytest.mark.parametrize("name", sorted(BUILTIN_POLICIES))
def test_builtin_policy_is_found_by_name(name):
    policy = load_policy(name)
    assert isinstance(policy, BalancingPolicy)
    assert f"{type(policy).__module__}:{type(policy).__name__}" == BUILTIN_POLICIES[name]


def test_policy_is_found_by_class(monkeypatch):
    offer(monkeypatch)
    assert type(load_policy("third_party:MyPolicy")) is MyPolicy


def test_policy_is_found_by_entry_point(monkeypatch):
    offer(monkeypatch, mine="third_party:MyPolicy")
    assert type(load_policy("mine")) is MyPolicy
    assert list(known_policies()) == [*BUILTIN_POLICIES, "mine"]


def test_builtin_name_cannot_be_taken(monkeypatch):
    offer(monkeypatch, split="third_party:MyPolicy")
    assert known_policies() == BUILTIN_POLICIES


def test_unknown_name_lists_the_known_ones(monkeypatch):
    offer(monkeypatch, mine="third_party:MyPolicy")
    with pytest.raises(UnknownPolicyError) as caught:
        load_policy("spilt")
    assert str(caught.value) == (
        "no policy is called 'spilt': use one of prefill, decode, shorter_queue, split, mine, or package.module:Class"
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("third_party:", "does not name a class"),
        (":MyPolicy", "does not name a class"),
        (".third_party:MyPolicy", "does not name a class"),
        ("no_such_module_at_all:MyPolicy", "cannot be imported: No module named"),
        ("third_party:Missing", "module third_party has no class Missing"),
        ("third_party:not_a_class", "has no class not_a_class"),
        ("third_party:NeedsArguments", "cannot be created without arguments"),
        ("third_party:NoPolicy", "is no policy"),
        ("builtins:object", "is no policy"),
    ],
)
def test_class_that_cannot_be_used_is_refused_in_one_sentence(name, sentence):
    with pytest.raises(PolicyError, match=sentence) as caught:
        load_policy(name)
    assert "\n" not in str(caught.value)
