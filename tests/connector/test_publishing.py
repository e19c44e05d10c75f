"""How a prefill engine publishes its control endpoint."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dualpath import metrics
from sglang_dualpath.connector import directory
from sglang_dualpath.connector.directory import publish
from tests.connector.bootstrap import ENDPOINT, Bootstrap
from tests.connector.conftest import Serve

# A connection that was accepted while the test's own aiohttp server shut down is found by the garbage collector only.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_an_engine_is_published_whatever_proxy_the_environment_names(
    address: str, bootstrap: Bootstrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # of no concern between servers of a cluster
    publish(f"http://{address}", dp_rank=0, tp_rank=0, endpoint=ENDPOINT).join(10)
    assert bootstrap.directory.endpoints == {"0.0": ENDPOINT}


def test_publishing_goes_on_until_the_bootstrap_server_is_up(
    bootstrap: Bootstrap, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_RETRY_S", 0.02)
    opened: list[str] = []
    stock = directory._OPENER.open

    def fail_twice(request: Any, **kwargs: Any) -> Any:
        opened.append(request.full_url)
        if len(opened) < 3:
            raise ConnectionRefusedError
        return stock(request, **kwargs)

    address = serve(bootstrap.app)
    monkeypatch.setattr(directory._OPENER, "open", fail_twice)
    thread = publish(f"http://{address}", dp_rank=0, tp_rank=3, endpoint=ENDPOINT)
    thread.join(10)
    assert bootstrap.directory.endpoints == {"0.3": ENDPOINT}
    assert len(opened) == 3


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a minute takes a tenth of a second."""
    for name, seconds in (("_RETRY_S", 0.001), ("_MOST_RETRY_S", 0.01), ("_OUTAGE_S", 0.1)):
        monkeypatch.setattr(directory, name, seconds)


class Refusing:
    """A bootstrap server that does not answer until it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self.answers = False
        self.asked_s: list[float] = []
        self._error = error
        self._open = directory._OPENER.open
        monkeypatch.setattr(directory._OPENER, "open", self._answer)

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        self.asked_s.append(time.monotonic())
        if self.answers:
            return self._open(*args, **kwargs)
        raise self._error


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("error", [ConnectionRefusedError("refused"), RuntimeError("on purpose")], ids=repr)
def test_publishing_goes_on_for_as_long_as_it_takes_and_says_so_once(
    bootstrap: Bootstrap,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    caplog.set_level("INFO")
    counted = metrics.FALLBACKS.value(reason="not_published")
    address = serve(bootstrap.app)
    server = Refusing(monkeypatch, error)
    thread = publish(f"http://{address}", dp_rank=0, tp_rank=0, endpoint=ENDPOINT)
    deadline_s = time.monotonic() + 10
    while len(server.asked_s) < 80 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert thread.is_alive()
    assert caplog.text.count(f"could not be published at http://{address}") == 1
    assert str(error) in caplog.text
    assert metrics.FALLBACKS.value(reason="not_published") == counted + 1
    server.answers = True
    thread.join(10)
    assert bootstrap.directory.endpoints == {"0.0": ENDPOINT}
    assert "is published" in caplog.text


@pytest.mark.usefixtures("impatient")
def test_who_publishes_asks_ever_more_seldom_up_to_a_limit(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Refusing(monkeypatch, ConnectionRefusedError())
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        server.answers = len(pauses) == 50

    monkeypatch.setattr(directory, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    thread = publish(f"http://{address}", dp_rank=0, tp_rank=0, endpoint=ENDPOINT)
    assert thread.daemon, "it does not keep its process"
    thread.join(10)
    assert len(pauses) == 50
    assert pauses[:2] == pytest.approx([0.001, 0.0011])
    assert pauses[-1] == pytest.approx(0.01)
    assert pauses == sorted(pauses)
