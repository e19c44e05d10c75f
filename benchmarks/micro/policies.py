"""A policy that is switched while servers run: it does what the policy named in a file does."""

from __future__ import annotations

import os
from pathlib import Path

from sglang_dualpath.policy import BalancingPolicy, ClusterView, ReadPlan, ReadRequest, load_policy

FILE_ENV = "DUALPATH_BENCHMARK_POLICY_FILE"
NAME = "benchmarks.micro.policies:Switchable"


class Switchable:
    """Reads the policy's name from the file that FILE_ENV names each time it is asked.

    What a policy needs is asked for once, when a server starts: start with one that needs the decode engine.
    """

    @property
    def needs_decode(self) -> bool:
        return self._current().needs_decode

    @property
    def reads_ahead(self) -> bool:
        return bool(getattr(self._current(), "reads_ahead", False))

    def plan(self, read: ReadRequest, view: ClusterView) -> ReadPlan:
        return self._current().plan(read, view)

    def _current(self) -> BalancingPolicy:
        return load_policy(Path(os.environ[FILE_ENV]).read_text().strip())
