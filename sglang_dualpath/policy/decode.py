"""The decode engine reads all of it and pushes it to the prefill engine."""

from sglang_dualpath.policy.types import ClusterView, ReadPlan, ReadRequest, ReadShare, prefill_alone


class DecodePolicy:
    """Keeps the prefill server's storage NIC free for requests whose decode engine cannot help."""

    needs_decode = True

    def plan(self, read: ReadRequest, view: ClusterView) -> ReadPlan:
        if read.decode is None:
            return prefill_alone(read, "decode engine unknown")
        return ReadPlan((ReadShare(read.decode, "front"),), "policy decode")
