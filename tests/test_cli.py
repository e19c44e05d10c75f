import importlib.metadata
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_dualpath import __version__, cli
from sglang_dualpath.config import FLAGS, flags_markdown
from sglang_dualpath.policy import BUILTIN_POLICIES

README = Path(__file__).parents[1] / "README.md"


def run(*words):
    result = CliRunner().invoke(cli.app, list(words))
    assert result.exit_code == 0, result.output
    return result.output


def test_flags_are_listed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    output = run("flags")
    assert "--kv-connector dualpath" in output
    for flag in FLAGS:
        assert flag.option in output


def test_flags_in_markdown_are_the_readmes_table():
    table = run("flags", "--markdown")
    assert table == flags_markdown()
    found = re.search(r"<!-- flags:begin[^>]*-->\n(.*?)<!-- flags:end -->", README.read_text(), re.DOTALL)
    assert found is not None
    assert found[1].strip() == table.strip(), "run: sglang-dualpath flags --markdown"


def test_policies_are_listed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli, "known_policies", lambda: BUILTIN_POLICIES | {"mine": "third_party:Mine"})
    output = run("policies")
    assert "split (default)" in output
    assert re.search(r"mine .*third_party:Mine .*another package", output)


def test_version_names_both_packages(monkeypatch):
    monkeypatch.setattr(cli, "version", lambda name: "0.5.23")
    assert run("version") == f"sglang-dualpath {__version__}, sglang 0.5.23\n"


def test_version_works_without_sglang(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cli, "version", missing)
    assert "sglang not installed" in run("version")


@pytest.mark.parametrize("word", ["flags", "policies", "version"])
def test_every_command_explains_itself(word):
    assert "Usage" in run(word, "--help")
