"""SGLang's Mooncake connector with the gate in its receiver and the control route in its bootstrap server."""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.mooncake import MooncakeKVBootstrapServer, MooncakeKVManager, MooncakeKVReceiver

from sglang_dualpath.connector.directory import add_routes
from sglang_dualpath.connector.gate import Gate, OpenGate


class DualPathMooncakeKVManager(MooncakeKVManager):
    """Carries the gate from the scheduler to its receivers."""

    gate: Gate = OpenGate()


class DualPathMooncakeKVReceiver(MooncakeKVReceiver):
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


class DualPathMooncakeKVBootstrapServer(MooncakeKVBootstrapServer):
    """Also publishes the control endpoints of the prefill engines."""

    def _setup_routes(self) -> None:
        super()._setup_routes()
        self.dualpath: Any = add_routes(self.app.router)


KV_CLASSES: dict[type, type] = {
    MooncakeKVManager: DualPathMooncakeKVManager,
    MooncakeKVReceiver: DualPathMooncakeKVReceiver,
    MooncakeKVBootstrapServer: DualPathMooncakeKVBootstrapServer,
}
