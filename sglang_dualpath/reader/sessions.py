"""What prefill engines' transfer engines said of themselves, so that it travels once and not with every offer."""

from __future__ import annotations

import msgspec

from sglang_dualpath.protocol import Target

# Requests name their prefill server, so a client could name any number of them.
_MAX_ENGINES = 1024


class Sessions:
    """Transfer sessions and their metadata by control endpoint. Not thread-safe."""

    def __init__(self) -> None:
        self._targets: dict[str, Target] = {}

    def known(self, endpoint: str) -> str:
        """The session whose metadata need not be sent; empty if there is none."""
        target = self._targets.get(endpoint)
        return "" if target is None else target.session

    def complete(self, endpoint: str, target: Target) -> Target:
        """``target`` of an offer of ``endpoint`` with the metadata that came with an earlier one, if it has none."""
        if target.metadata:
            self._targets.pop(endpoint, None)
            while len(self._targets) >= _MAX_ENGINES:
                del self._targets[next(iter(self._targets))]
            self._targets[endpoint] = target
            return target
        before = self._targets.get(endpoint)
        if before is None or before.session != target.session:
            return target
        return msgspec.structs.replace(target, metadata=before.metadata)
