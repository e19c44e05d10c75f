"""Hooks that SGLang could not apply, or that another plugin overrode, stop the server in the process where it shows."""

from __future__ import annotations

import pytest

from tests.compat.conftest import Argv
from tests.compat.forks import ForkServer
from tests.compat.test_switch import OTHER_HOOKS

# The first test of a run waits for the process that imports SGLang, on a machine that may be in use.
pytestmark = pytest.mark.timeout(420)


SWITCH = {"SGLANG_KV_CONNECTOR": "dualpath"}


@pytest.mark.parametrize("target", OTHER_HOOKS)
def test_a_hook_that_fails_in_a_scheduler_process_stops_it_before_it_has_a_tree(forks: ForkServer, target: str) -> None:
    outcome = forks.run("hook_fails", target, env=SWITCH)
    assert outcome.code == 1
    # Above it is SGLang's own log of why.
    sentence = outcome.stderr.rstrip().rpartition("\n")[2]
    assert sentence.startswith(f"SGLang could not apply the hooks of sglang_dualpath on {target};")


@pytest.mark.parametrize("target", OTHER_HOOKS[:1])
def test_a_hook_that_fails_in_the_main_process_stops_it_before_it_starts_others(
    forks: ForkServer, argv: Argv, target: str
) -> None:
    outcome = forks.run("hook_fails_in_the_main_process", target, argv("decode"))
    assert outcome.code == 1
    assert outcome.report is None
    assert f"SGLang could not apply the hooks of sglang_dualpath on {target};" in outcome.stderr


@pytest.mark.parametrize("target", OTHER_HOOKS)
def test_a_hook_that_another_plugin_overrides_stops_the_process(forks: ForkServer, target: str) -> None:
    outcome = forks.run("hook_lost", target, env=SWITCH)
    assert outcome.code == 1
    sentence = outcome.stderr.rstrip().rpartition("\n")[2]
    assert sentence.startswith(f"Another plugin changed {target} too,")
    assert "SGLANG_PLUGINS" in sentence


@pytest.mark.parametrize("backend", ["mooncake", "nixl"])
def test_a_scheduler_process_without_faults_makes_its_tree(forks: ForkServer, backend: str) -> None:
    outcome = forks.run("tree", backend, env=SWITCH)
    assert outcome.code == 0, outcome.stderr
    assert outcome.report == {"prefill": "DualPathPrefillTree", "decode": "DualPathDecodeTree"}
