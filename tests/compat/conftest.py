"""One preloaded process and one tiny model for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.compat.forks import ForkServer

Argv = Callable[..., list[str]]


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("forks") / "log")
    yield server
    server.close()


@pytest.fixture(scope="session")
def model(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outcome = forks.run("model", str(tmp_path_factory.mktemp("models")))
    assert outcome.code == 0, outcome
    return Path(outcome.report)


@pytest.fixture(scope="session")
def argv(model: Path) -> Argv:
    """Makes the command line of a server of a role, with further flags."""

    def make(mode: str | None, *flags: str, switch: bool = True, storage: str | None = "file") -> list[str]:
        line = ["--model-path", str(model), "--device", "cpu", "--dtype", "float32", "--page-size", "64"]
        if mode is not None:
            line += ["--disaggregation-mode", mode]
        if switch:
            line += ["--kv-connector", "dualpath"]
        if storage is not None:
            line += ["--hicache-storage-backend", storage]
        return [*line, "--hicache-mem-layout", "page_first_direct", "--hicache-io-backend", "direct", *flags]

    return make
