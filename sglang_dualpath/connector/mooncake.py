"""SGLang's Mooncake connector with what every connector of ours adds."""

from __future__ import annotations

from sglang.srt.disaggregation.mooncake import MooncakeKVBootstrapServer, MooncakeKVManager, MooncakeKVReceiver

from sglang_dualpath.connector.gated import GatedKVManager, GatedKVReceiver, PublishingKVBootstrapServer
from sglang_dualpath.transfer import Transport
from sglang_dualpath.transfer.mooncake import MooncakeTransport


class DualPathMooncakeKVManager(GatedKVManager, MooncakeKVManager):
    def transport(self) -> Transport:
        return MooncakeTransport(self.engine)


class DualPathMooncakeKVReceiver(GatedKVReceiver, MooncakeKVReceiver):
    pass


class DualPathMooncakeKVBootstrapServer(PublishingKVBootstrapServer, MooncakeKVBootstrapServer):
    pass


KV_CLASSES: dict[type, type] = {
    MooncakeKVManager: DualPathMooncakeKVManager,
    MooncakeKVReceiver: DualPathMooncakeKVReceiver,
    MooncakeKVBootstrapServer: DualPathMooncakeKVBootstrapServer,
}
