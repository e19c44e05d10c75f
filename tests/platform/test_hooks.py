import sys
import types

import pytest
from sglang_cpu_platform import hooks


@pytest.fixture
def target(monkeypatch):
    module = types.ModuleType("target_of_hooks")
    module.Thing = type("Thing", (), {"size": lambda self: 1, "limit": 5})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def doubled(original):
    return lambda *args: 2 * original(*args)


def test_wrapping_twice_wraps_once(target):
    for _ in range(2):
        hooks.wrap("target_of_hooks", "Thing.size", doubled)
    assert target.Thing().size() == 2


def test_assign_sets_an_existing_constant(target):
    hooks.assign("target_of_hooks", "Thing.limit", 7)
    assert target.Thing.limit == 7


@pytest.mark.parametrize("path", ["Thing.gone", "Gone.size", "gone"])
def test_a_missing_target_ends_the_process_with_a_sentence(target, path):
    with pytest.raises(SystemExit, match=rf"replaces target_of_hooks\.{path}, which this SGLang lacks"):
        hooks.wrap("target_of_hooks", path, doubled)


def test_a_missing_module_ends_the_process_with_a_sentence():
    with pytest.raises(SystemExit, match=r"needs SGLang's module sglang_gone\.part"):
        hooks.resolve("sglang_gone.part", "Thing")
