"""The fixture that makes servers and clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.control.ends import Ends


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    for end in ends.open:
        end.close()
