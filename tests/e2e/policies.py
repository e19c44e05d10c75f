"""Policies of the tests: one that is switched while servers run, and one that always shares."""

from __future__ import annotations

import os
from pathlib import Path

from sglang_dualpath.policy import BalancingPolicy, ClusterView, ReadPlan, ReadRequest, ReadShare, load_policy

FILE_ENV = "DUALPATH_TEST_POLICY_FILE"


class Switchable:
    """Reads the policy's name from ``$DUALPATH_TEST_POLICY_FILE`` each time it is asked; `split` without the file."""

    @property
    def needs_decode(self) -> bool:
        return self._current().needs_decode

    @property
    def reads_ahead(self) -> bool:
        return bool(getattr(self._current(), "reads_ahead", False))

    def plan(self, read: ReadRequest, view: ClusterView) -> ReadPlan:
        return self._current().plan(read, view)

    def _current(self) -> BalancingPolicy:
        path = Path(os.environ[FILE_ENV])
        return load_policy(path.read_text().strip() if path.exists() else "split")


class Sharing:
    """`split` without a look at what pays: both sides take part in every read, however slow one was before."""

    needs_decode = True
    reads_ahead = True

    def plan(self, read: ReadRequest, view: ClusterView) -> ReadPlan:
        shares = [ReadShare(read.prefill, "back")]
        if read.decode is not None:
            shares.append(ReadShare(read.decode, "front"))
        return ReadPlan(tuple(shares), "both")
