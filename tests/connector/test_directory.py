"""The bootstrap server's table of control endpoints."""

from __future__ import annotations

import pytest

from sglang_dualpath.connector import directory
from tests.connector.bootstrap import ENDPOINT, Bootstrap, engine, get, put

# A connection that was accepted while the test's own aiohttp server shut down is found by the garbage collector only.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_what_was_put_is_listed_by_rank(address: str) -> None:
    assert put(address, engine()) == (200, "OK")
    assert put(address, engine("tcp://10.0.0.1:7001", tp_rank=1))[0] == 200
    assert get(address) == {"0.0": ENDPOINT, "0.1": "tcp://10.0.0.1:7001"}


def test_a_restarted_engine_takes_its_place_again(address: str) -> None:
    put(address, engine())
    put(address, engine("tcp://10.0.0.1:7002"))
    assert get(address) == {"0.0": "tcp://10.0.0.1:7002"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"\xff\xfe",
        [],
        "text",
        None,
        7,
        {},
        {"dp_rank": 0, "tp_rank": 0},
        {"dp_rank": "x", "tp_rank": 0, "endpoint": ENDPOINT},
        {"dp_rank": None, "tp_rank": 0, "endpoint": ENDPOINT},
        {"dp_rank": [0], "tp_rank": 0, "endpoint": ENDPOINT},
        engine("http://10.0.0.1:7000"),
        engine(""),
        engine("tcp://" + "h" * 260),
        engine(dp_rank=-1),
        engine(tp_rank=-1),
        engine(dp_rank=10**9),
        {"dp_rank": 1e400, "tp_rank": 0, "endpoint": ENDPOINT},
    ],
)
def test_a_body_that_is_not_an_engine_is_refused_and_changes_nothing(address: str, body: object) -> None:
    put(address, engine())
    assert put(address, body)[0] == 400
    assert get(address) == {"0.0": ENDPOINT}


def test_the_table_is_bounded_but_known_engines_may_move(
    address: str, bootstrap: Bootstrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_MAX_ENGINES", 2)
    put(address, engine(tp_rank=0))
    put(address, engine(tp_rank=1))
    assert put(address, engine(tp_rank=2))[0] == 400
    assert put(address, engine("tcp://10.0.0.1:7005", tp_rank=1))[0] == 200
