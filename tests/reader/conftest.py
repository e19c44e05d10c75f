"""The fixture that makes engines and, at the end of a test, checks that nothing is left over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.reader.cluster import Cluster, running


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with running(Cluster()) as cluster:
        yield cluster
