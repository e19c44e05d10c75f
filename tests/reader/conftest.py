"""The fixture that makes engines and, at the end of a test, checks that nothing is left over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.reader.cluster import PATIENT, Cluster, running


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with running(Cluster()) as cluster:
        yield cluster


@pytest.fixture
def patient(cluster: Cluster) -> None:
    """Engines that are made without a config of their own wait long enough for a busy machine."""
    cluster.config = PATIENT
