"""What our connectors have in common: a gate in the receiver, a control route in the bootstrap server, a transport."""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer, CommonKVManager, CommonKVReceiver

from sglang_dualpath.compat import native
from sglang_dualpath.connector.directory import add_routes
from sglang_dualpath.connector.gate import Gate, OpenGate
from sglang_dualpath.transfer import Transport


class GatedKVManager(CommonKVManager):
    """Carries the gate from the scheduler to its receivers, and lends its transfer engine to the hop."""

    gate: Gate = OpenGate()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As upstream, whose senders tell decode servers which data-parallel rank has a room.

        They name the rank in attention data parallelism. Without that it is 0 on every rank: rooms of the others are
        failed (``follow_bootstrap_room``) or waited for at rank 0 (every other ``--load-balance-method``). The rank
        that upstream's bootstrap server files engines under is the right one.
        """
        super().__init__(*args, **kwargs)
        if self.system_dp_size > 1 and not native.has(native.DATA_PARALLEL_RANK_OF_A_ROOM):
            self.attn_dp_rank = self.system_dp_rank

    def transport(self, storage: object) -> Transport:
        """A new transport over this manager's transfer engine. ``storage`` is the backend of HiCache beside it."""
        raise NotImplementedError


class GatedKVReceiver(CommonKVReceiver):
    """Says ``Bootstrapping`` until the request's read has settled, so that upstream's queue waits by itself."""

    def init(self, prefill_dp_rank: int) -> None:
        super().init(prefill_dp_rank)
        if self.bootstrap_room is not None:
            self.kv_mgr.gate.located(self.bootstrap_room, self, prefill_dp_rank)

    def poll(self) -> KVPoll:
        status = super().poll()
        if (
            status == KVPoll.WaitingForInput
            and self.init_time is None
            and self.kv_mgr.gate.pending(self.bootstrap_room)
        ):
            return KVPoll.Bootstrapping
        return status

    def clear(self) -> None:
        super().clear()
        if self.bootstrap_room is not None:
            self.kv_mgr.gate.gone(self.bootstrap_room, self)


class PublishingKVBootstrapServer(CommonKVBootstrapServer):
    """Also publishes the control endpoints of the prefill engines."""

    def _setup_routes(self) -> None:
        super()._setup_routes()
        self.dualpath: Any = add_routes(self.app.router)
