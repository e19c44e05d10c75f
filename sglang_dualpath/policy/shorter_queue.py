"""The DualPath paper's rule (arXiv 2602.21548): the whole read to the side with the shorter reading queue."""

from sglang_dualpath.policy.types import ClusterView, ReadPlan, ReadRequest, ReadShare, prefill_alone


class ShorterQueuePolicy:
    """Fewer queued bytes at the node's storage NIC wins.

    A tie goes to the side that has less to read for this request, which is the decode engine when it holds some of
    the pages; else to the prefill engine, which needs no hop.
    """

    needs_decode = True

    def plan(self, read: ReadRequest, view: ClusterView) -> ReadPlan:
        if read.decode is None:
            return prefill_alone(read, "decode engine unknown")
        prefill_queued_bytes = view.queued_read_bytes(read.prefill)
        decode_queued_bytes = view.queued_read_bytes(read.decode)
        reason = f"queued bytes: prefill {prefill_queued_bytes}, decode {decode_queued_bytes}"
        tie_goes_to_decode = read.decode_held_pages > 0
        if decode_queued_bytes < prefill_queued_bytes or (
            decode_queued_bytes == prefill_queued_bytes and tie_goes_to_decode
        ):
            return ReadPlan((ReadShare(read.decode, "front"),), reason)
        return prefill_alone(read, reason)
