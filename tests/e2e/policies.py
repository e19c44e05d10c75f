"""A policy that tests switch while servers run: it does what the policy named in a file does."""

from __future__ import annotations

import os
from pathlib import Path

from sglang_dualpath.policy import BalancingPolicy, ClusterView, ReadPlan, ReadRequest, load_policy

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
