"""Policies of the tests, which always share."""

from __future__ import annotations

from sglang_dualpath.policy import ClusterView, ReadPlan, ReadRequest, ReadShare


class Sharing:
    """`split` without a look at what pays: both sides take part in every read, however slow one was before."""

    needs_decode = True
    reads_ahead = True

    def plan(self, read: ReadRequest, view: ClusterView) -> ReadPlan:
        shares = [ReadShare(read.prefill, "back")]
        if read.decode is not None:
            shares.append(ReadShare(read.decode, "front"))
        return ReadPlan(tuple(shares), "both")


class Patient(Sharing):
    """Reads nothing before it has heard the decode engine, so that no HELLO comes too late."""

    reads_ahead = False
