"""Applies patches/ to a copy of the installed SGLang, and runs tests against it: what `make check-patches` does.

The copy is made of hard links where the file system allows, so it costs a second and no space. Files that a patch
changes are written anew, and so is what Python compiles of them; the installed SGLang stays as it is, which is checked.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "out" / "patched"
# What knows SGLang by heart. End to end, one row and two data-parallel ranks (whose number one patch is about): every
# output compared with the patched SGLang's own.
UNIT = ["tests/compat/test_seams.py", "tests/compat/test_switch.py", "tests/connector", "tests/hicache"]
ROW = "mooncake-gateway-gqa"
TESTS = f"{ROW} and (nothing_is_cached or split and (from_storage or holds_more) or hit_bytes) or round_robin"
END_TO_END = ["tests/e2e/test_identity.py", "tests/e2e/test_data_parallel.py", "-m", "e2e", "-k", TESTS]


def installed() -> Path:
    """Where SGLang lies. Raises SystemExit if it is not installed."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("SGLang is not installed here: run `make setup` first.")
    return Path(next(iter(spec.submodule_search_locations)))


def copy_of(source: Path) -> Path:
    """A fresh copy in `out/patched`."""
    shutil.rmtree(COPY, ignore_errors=True)
    COPY.mkdir(parents=True)

    def link_or_copy(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    shutil.copytree(source, COPY / "sglang", copy_function=link_or_copy)
    return COPY


def changed_files(patch: Path) -> list[str]:
    """Paths below `python/` that a patch changes."""
    lines = patch.read_text().splitlines()
    return [line.removeprefix("+++ b/python/") for line in lines if line.startswith("+++ b/python/")]


def main() -> None:
    source = installed()
    copy = copy_of(source)
    patches = sorted((ROOT / "patches").glob("*.patch"))
    touched = {name for patch in patches for name in changed_files(patch)}
    before = {name: (source.parent / name).read_bytes() for name in touched}
    if shutil.which("git") is None:
        raise SystemExit("git applies the patches: install it.")
    for patch in patches:
        apply = ["git", "apply", "-p2", f"--directory={copy.relative_to(ROOT)}", str(patch)]
        if not subprocess.run([*apply, "--reverse", "--check"], cwd=ROOT, stderr=subprocess.DEVNULL).returncode:
            raise SystemExit(f"{patch.name} is applied to the installed SGLang already: check against a stock one.")
        if subprocess.run([*apply, "--whitespace=error-all"], cwd=ROOT).returncode:
            raise SystemExit(f"{patch.name} does not apply to the SGLang in {source}.")
        print(f"applied {patch.name}", flush=True)
    spoilt = [name for name, content in before.items() if (source.parent / name).read_bytes() != content]
    untouched = [name for name in touched if (copy / name).read_bytes() == before[name]]
    if spoilt or untouched:
        raise SystemExit(f"Changed in place: {spoilt}; not changed in the copy: {untouched}.")
    search_path = os.pathsep.join(filter(None, [str(copy), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": search_path, "DUALPATH_PATCHED_SGLANG": str(copy)}
    pytest = [sys.executable, "-m", "pytest", "-q"]
    where = [sys.executable, "-c", "import sglang; print(sglang.__file__)"]
    found = subprocess.run(where, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    if not Path(found.strip()).is_relative_to(copy):
        raise SystemExit(f"Tests would import SGLang from {found.strip()}, not from the copy in {copy}.")
    more = shlex.split(os.environ.get("PYTEST_ARGS", ""))
    for name, what in {"unit": [*UNIT, "-m", "not e2e and not gpu"], "e2e": END_TO_END}.items():
        command = [*pytest, *what, f"--junitxml=out/{name}-patched.xml", *more]
        print("+", " ".join(command[1:]), flush=True)
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if code:
            raise SystemExit(code)


if __name__ == "__main__":
    main()
