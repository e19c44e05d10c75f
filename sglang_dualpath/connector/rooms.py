"""Which requests have a room of their own."""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST


def real_room(req: Any) -> int | None:
    """The bootstrap room of a request that two servers share; None for warm-up requests and for stand-alone ones."""
    room = getattr(req, "bootstrap_room", None)
    if room is None or getattr(req, "bootstrap_host", None) == FAKE_BOOTSTRAP_HOST:
        return None
    return int(room)
