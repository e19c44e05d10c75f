"""Which platform and which plugins SGLang loads, asked of SGLang itself in fresh interpreters."""

import json
import os
import subprocess
import sys

import pytest
import sglang_cpu_platform

QUESTION = """
import json
from sglang.srt import plugins
from sglang.srt.platforms import current_platform
general = plugins.load_plugins_by_group(plugins.GENERAL_PLUGINS_GROUP, plugins._get_excluded_dists())
print(json.dumps({"platform": type(current_platform).__name__, "plugins": sorted(general)}))
"""


@pytest.fixture
def foreign_platform(tmp_path):
    """A directory with an installed distribution that provides the platform ``foreign``."""
    (tmp_path / "foreign_platform.py").write_text(
        "from sglang.srt.platforms.cpu import CpuSRTPlatform\n"
        "class ForeignPlatform(CpuSRTPlatform):\n    pass\n"
        "def activate():\n    return 'foreign_platform.ForeignPlatform'\n"
    )
    metadata = tmp_path / "foreign_platform-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-platform\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.platforms]\nforeign = foreign_platform:activate\n")
    return tmp_path


def ask_sglang(directory, platform):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
    environment["PYTHONPATH"] = str(directory)
    if platform is not None:
        environment["SGLANG_PLATFORM"] = platform
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", QUESTION], env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


def test_the_platform_serves_when_it_is_named(foreign_platform):
    answer = ask_sglang(foreign_platform, sglang_cpu_platform.PLATFORM_NAME)
    assert answer["platform"] == "DualPathCpuPlatform"
    assert "dualpath" in answer["plugins"]


def test_a_foreign_platform_keeps_the_dualpath_plugin_and_its_own_place(foreign_platform):
    answer = ask_sglang(foreign_platform, "foreign")
    assert answer["platform"] == "ForeignPlatform"
    assert "dualpath" in answer["plugins"]


def test_unasked_the_platform_leaves_the_machine_to_others(foreign_platform):
    # Both platforms are installed and SGLang accepts one volunteer: had this one volunteered, it would have refused.
    answer = ask_sglang(foreign_platform, None)
    assert answer["platform"] == "ForeignPlatform"
    assert "dualpath" in answer["plugins"]


@pytest.mark.parametrize("selected", [None, "", "foreign", "dualpath_cpu_2"])
def test_activate_declines_unless_named(monkeypatch, selected):
    if selected is None:
        monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    else:
        monkeypatch.setenv("SGLANG_PLATFORM", selected)
    assert sglang_cpu_platform.activate() is None
