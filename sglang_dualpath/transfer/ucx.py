"""What the hop over NIXL relies on of UCX, which carries it."""

from __future__ import annotations

import os
import re

from sglang_dualpath.errors import TransferError

# A write that failed is purged with its connection. UCX looks after a silent peer in rounds, so within two of them it
# has given up every other rail, and a third one covers what kernels and NICs still hold.
_DRAIN_ROUNDS = 3
_ROUND_ENV = "UCX_KEEPALIVE_INTERVAL"
_DEFAULT_ROUND_S = 20.0
_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0}


def drain_s() -> float:
    """How long bytes of a failed write may still arrive. Raises TransferError when UCX is told not to look for that."""
    said = os.environ.get(_ROUND_ENV, "")
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s|m|)", said.strip()) if said else None
    if said and parts is None:
        raise TransferError(
            f"{_ROUND_ENV}={said} does not say within what time UCX gives up a dead peer, after which its pages can be "
            f"used again; unset it, or give a time as in {_ROUND_ENV}=20s"
        )
    round_s = float(parts[1]) * _UNITS_S[parts[2]] if parts else _DEFAULT_ROUND_S
    return _DRAIN_ROUNDS * max(round_s, _DEFAULT_ROUND_S)
