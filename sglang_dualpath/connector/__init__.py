"""Subclasses of SGLang's KV managers, receivers and bootstrap servers, and the lookup of control endpoints.

Which transfer backend runs is known here and in ``transfer`` alone: the rest of the package asks the KV manager for a
transport.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

#: By SGLang's name of the transfer backend: where our subclasses for it are. Imported when that backend is used.
_MODULES = {"mooncake": "sglang_dualpath.connector.mooncake", "nixl": "sglang_dualpath.connector.nixl"}


def kv_classes(backend: str) -> Mapping[type, type]:
    """SGLang's connector classes of a transfer backend, and ours for them; none for a backend that is not served."""
    module = _MODULES.get(backend)
    if module is None:
        return {}
    classes: Mapping[type, type] = importlib.import_module(module).KV_CLASSES
    return classes
