"""The prefill engine reads all of it, as SGLang without DualPath does."""

from sglang_dualpath.policy.types import ClusterView, ReadPlan, ReadRequest, prefill_alone


class PrefillPolicy:
    """Never asks the decode engine, not even for what it holds in memory."""

    needs_decode = False

    def plan(self, read: ReadRequest, view: ClusterView) -> ReadPlan:
        return prefill_alone(read, "policy prefill")
