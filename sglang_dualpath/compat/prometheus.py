"""Leaves it to SGLang to decide how processes share their metrics.

What: ``prometheus_client`` decides when it is first imported whether processes share their values, by
``PROMETHEUS_MULTIPROC_DIR``. SGLang sets that after it has parsed its arguments, and imports it after that.
Why: this package has to import SGLang's connectors before, and they have a counter on module level. SGLang's counters
of the main process, those of requests and tokens, would then be missing in ``/metrics``.
Remove when: SGLang's connectors import it when they are used.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

_PACKAGE = "prometheus_client"


@contextlib.contextmanager
def undecided() -> Iterator[None]:
    """If ``prometheus_client`` was not imported yet, nor its mode set, it is forgotten at the end of this block.

    What was imported from it in here goes on with a copy that nobody shows: in the main process that is never used.
    """
    decided = _PACKAGE in sys.modules or "PROMETHEUS_MULTIPROC_DIR" in os.environ
    yield
    if not decided:
        for name in [name for name in sys.modules if name == _PACKAGE or name.startswith(f"{_PACKAGE}.")]:
            del sys.modules[name]
