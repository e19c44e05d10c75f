"""SGLang's NIXL connector with what every connector of ours adds."""

from __future__ import annotations

from sglang.srt.disaggregation.nixl import NixlKVBootstrapServer, NixlKVManager, NixlKVReceiver

from sglang_dualpath.connector.gated import GatedKVManager, GatedKVReceiver, PublishingKVBootstrapServer
from sglang_dualpath.transfer import Transport
from sglang_dualpath.transfer.nixl import NixlTransport


class DualPathNixlKVManager(GatedKVManager, NixlKVManager):
    def transport(self, storage: object) -> Transport:
        return NixlTransport(self.agent)


class DualPathNixlKVReceiver(GatedKVReceiver, NixlKVReceiver):
    pass


class DualPathNixlKVBootstrapServer(PublishingKVBootstrapServer, NixlKVBootstrapServer):
    pass


KV_CLASSES: dict[type, type] = {
    NixlKVManager: DualPathNixlKVManager,
    NixlKVReceiver: DualPathNixlKVReceiver,
    NixlKVBootstrapServer: DualPathNixlKVBootstrapServer,
}
