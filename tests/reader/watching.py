"""A policy that remembers what it was shown."""

from __future__ import annotations

from typing import ClassVar

from sglang_dualpath.policy import ClusterView, EngineView, ReadPlan, ReadRequest, load_policy


class Watching:
    """`split`, with the views of the decode engine it was asked about, in order."""

    needs_decode = True
    reads_ahead = True
    views: ClassVar[list[EngineView | None]] = []

    def plan(self, read: ReadRequest, view: ClusterView) -> ReadPlan:
        if read.decode is not None:
            self.views.append(view.get(read.decode))
        return load_policy("split").plan(read, view)
