"""What our connectors have in common: a gate in the receiver, a control route in the bootstrap server, a transport."""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer, CommonKVManager, CommonKVReceiver

from sglang_dualpath.connector.directory import add_routes
from sglang_dualpath.connector.gate import Gate, OpenGate
from sglang_dualpath.transfer import Transport


class GatedKVManager(CommonKVManager):
    """Carries the gate from the scheduler to its receivers, and lends its transfer engine to the hop."""

    gate: Gate = OpenGate()

    def transport(self) -> Transport:
        """A new transport over this manager's transfer engine, with nothing registered yet."""
        raise NotImplementedError


class GatedKVReceiver(CommonKVReceiver):
    """Says ``Bootstrapping`` until the request's read has settled, so that upstream's queue waits by itself."""

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
