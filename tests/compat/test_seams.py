"""What of SGLang is relied on: each thing is declared, and its absence stops the server in a sentence that names it."""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import sglang_dualpath
from sglang_dualpath.compat.catalogue import CONNECTOR_SEAMS
from sglang_dualpath.compat.catalogue import SEAMS as COMMON_SEAMS
from sglang_dualpath.compat.seams import SUPPORTED_RELEASE, Seam, check
from sglang_dualpath.errors import SeamError
from tests.compat.forks import PATCHED, ForkServer, Outcome

# The first test of a run waits for the process that imports SGLang, on a machine that may be in use.
pytestmark = pytest.mark.timeout(420)


PACKAGE = Path(sglang_dualpath.__file__).parent
SWITCH = {"SGLANG_KV_CONNECTOR": "dualpath"}
ALL_SEAMS = (*COMMON_SEAMS, *itertools.chain.from_iterable(CONNECTOR_SEAMS.values()))
# Where the patches are applied, nothing relies on what they make needless.
SEAMS = [seam for seam in ALL_SEAMS if not (PATCHED and seam.native)]


# -- one missing -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without(forks: ForkServer) -> Mapping[str, Outcome]:
    """Outcome of the plugin's start by the seam that SGLang lacks."""
    outcome = forks.run("without_each_seam", env=SWITCH, limit_s=110)
    assert outcome.code == 0, outcome.stderr
    return {name: Outcome(code, "", stderr, None) for name, (code, stderr) in outcome.report.items()}


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_a_missing_seam_stops_the_process_with_a_sentence_that_names_it(
    without: Mapping[str, Outcome], seam: Seam
) -> None:
    sentence = without[seam.name].sentence
    if seam.parameters and seam.attribute is None:
        assert f"{seam.name} has no parameter {seam.parameters[0]}" in sentence
    else:
        assert f"{seam.name} is missing" in sentence
    assert sentence.startswith(f"SGLang {SUPPORTED_RELEASE} lacks what sglang_dualpath hooks into")
    assert sentence.endswith("install stock SGLang, or drop --kv-connector.")


@pytest.mark.parametrize(("backend", "other"), [("mooncake", "nixl"), ("nixl", "mooncake")])
def test_only_the_connector_in_use_is_looked_at(forks: ForkServer, backend: str, other: str) -> None:
    outcome = forks.run("without_the_other_connector", backend, other, env=SWITCH)
    assert outcome.code == 0, outcome.stderr
    assert outcome.report == {"imported": [f"sglang_dualpath.connector.{backend}"]}


def test_what_the_patches_add_is_found_where_they_are_applied_and_only_there(forks: ForkServer) -> None:
    outcome = forks.run("natives")
    assert outcome.code == 0, outcome.stderr
    patches = {path.stem.partition("-")[2] for path in (PACKAGE.parent / "patches").glob("*.patch")}
    assert outcome.report == dict.fromkeys(patches, bool(PATCHED))


def test_stock_sglang_has_every_seam(forks: ForkServer) -> None:
    outcome = forks.run("child", env=SWITCH)
    assert outcome.code == 0, outcome.stderr


# -- the check itself --------------------------------------------------------------------------------------------------


class Thing:
    """Stands in for a class of SGLang's."""

    declared: int

    def __init__(self) -> None:
        self.made = 1

    @property
    def computed(self) -> int:
        self.kept = 2
        return self.kept

    def read(self) -> object:
        return self.only_read  # type: ignore[attr-defined]

    def call(self, first: int, **others: int) -> None: ...

    def strict(self, first: int) -> None: ...


def seam(name: str = "", parameters: tuple[str, ...] = (), attribute: str | None = None) -> Seam:
    return Seam(f"{__name__}.Thing{name}", "a thing", "it is used", "never", parameters, attribute)


@pytest.mark.parametrize("attribute", ["made", "kept", "declared", "computed"])
def test_an_attribute_that_the_class_sets_or_declares_is_there(attribute: str) -> None:
    check([seam(attribute=attribute)])


@pytest.mark.parametrize("attribute", ["mad", "made_up", "only_read"])
def test_an_attribute_that_it_only_reads_or_has_under_another_name_is_not(attribute: str) -> None:
    with pytest.raises(SeamError, match=rf"Thing\.{attribute} is missing"):
        check([seam(attribute=attribute)])


def test_parameters_are_looked_for_by_name() -> None:
    check([seam(".strict", ("first",))])
    with pytest.raises(SeamError, match=r"Thing\.strict has no parameter second, third"):
        check([seam(".strict", ("first", "second", "third"))])


def test_a_function_that_takes_any_keyword_lacks_none() -> None:
    check([seam(".call", ("anything",))])


def test_all_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(SeamError, match=r"Thing\.gone is missing; .*Thing\.lost is missing"):
        check([seam(".gone"), seam(".lost")])


@pytest.mark.parametrize("release", ["0.5.23", "0.5.23+cu129", "0.5.23.post1"])
def test_builds_of_the_supported_release_are_fine(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: release)
    check([])


@pytest.mark.parametrize("release", ["0.5.22", "0.5.24", "0.5.230", "0.6.0rc1"])
def test_other_releases_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: release)
    with pytest.raises(SeamError, match=rf"works with SGLang 0\.5\.23, and {release} is installed"):
        check([])


# -- the list is complete ----------------------------------------------------------------------------------------------


def test_each_seam_says_what_it_is_why_and_until_when() -> None:
    assert [one.name for one in ALL_SEAMS if not (one.what and one.why and one.remove_when)] == []


def test_no_seam_is_named_twice() -> None:
    assert [name for name, count in Counter(one.name for one in ALL_SEAMS).items() if count > 1] == []


def sources(*parts: str) -> Iterator[tuple[str, ast.Module]]:
    for part in parts:
        for path in sorted((PACKAGE / part).glob("*.py")):
            yield f"{part}/{path.name}", ast.parse(path.read_text())


def own_names() -> set[str]:
    """Everything that starts with an underscore and is defined in this package."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return found


def test_every_private_name_of_sglang_is_declared() -> None:
    known = {one.name.rpartition(".")[2] for one in ALL_SEAMS} | own_names()
    private = [
        f"{where}:{node.lineno} {node.attr}"
        for where, module in sources("hicache", "scheduler", "connector", "compat", "reader", "transfer")
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in known
    ]
    assert private == []


def test_every_import_and_override_of_sglang_is_declared(forks: ForkServer) -> None:
    outcome = forks.run("undeclared")
    assert outcome.code == 0, outcome.stderr
    assert outcome.report == {"imports": [], "overrides": []}


def test_every_server_argument_that_is_read_or_set_is_declared() -> None:
    declared = {one.name.rpartition(".")[2] for one in ALL_SEAMS if ".ServerArgs." in one.path}
    used = set()
    for _, module in sources("compat"):
        for node in ast.walk(module):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cfg":
                used.add(node.attr)
    assert used - declared == set()
    assert "pp_size" in used
