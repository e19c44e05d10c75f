"""SGLang's Mooncake connector with what every connector of ours adds."""

from __future__ import annotations

from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.mooncake import MooncakeKVBootstrapServer, MooncakeKVManager, MooncakeKVReceiver

from sglang_dualpath.compat import native, stores
from sglang_dualpath.connector.gated import GatedKVManager, GatedKVReceiver, PublishingKVBootstrapServer
from sglang_dualpath.transfer import Transport
from sglang_dualpath.transfer.mooncake import MooncakeTransport


class DualPathMooncakeKVManager(GatedKVManager, MooncakeKVManager):
    def transport(self, storage: object) -> Transport:
        shared = stores.shares_engine(storage, str(self.engine.get_session_id()))
        return MooncakeTransport(self.engine, registered=shared)


class TolerantMooncakeKVManager(DualPathMooncakeKVManager):
    """For an SGLang whose transfer workers do not survive a room that is cleared beside them."""

    def check_status(self, bootstrap_room: int) -> KVPoll:
        """The status of a room; ``Failed`` for one that has been cleared, where upstream raises KeyError.

        Upstream's transfer workers look whether a room exists and then ask for its status. Between the two the
        scheduler may see that the transfer has ended and clear the room; the error would end the worker, and every
        later request of its queue would wait forever. To a worker ``Failed`` says the same as "cleared". SGLang's NIXL
        manager has an answer of its own for such rooms.
        """
        status: KVPoll = self.request_status.get(bootstrap_room, KVPoll.Failed)
        return status


class DualPathMooncakeKVReceiver(GatedKVReceiver, MooncakeKVReceiver):
    pass


class DualPathMooncakeKVBootstrapServer(PublishingKVBootstrapServer, MooncakeKVBootstrapServer):
    pass


KV_CLASSES: dict[type, type] = {
    MooncakeKVManager: (
        DualPathMooncakeKVManager if native.has(native.STATUS_OF_A_CLEARED_ROOM) else TolerantMooncakeKVManager
    ),
    MooncakeKVReceiver: DualPathMooncakeKVReceiver,
    MooncakeKVBootstrapServer: DualPathMooncakeKVBootstrapServer,
}
