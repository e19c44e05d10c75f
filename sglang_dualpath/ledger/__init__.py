"""The ledger of one read: who reads which pages of a prompt into which host slots, and what a failure leads to.

Where does my code go?

    types.py     the values that pass in and out: shares, grants, refusals, swaps, statistics
    spans.py     sets of pages kept as sorted runs
    readers.py   what a ledger knows of one reader
    reserve.py   the spare host slots of one rank, shared by all its ledgers
    ledger.py    the rules: claim, land, fail, expire, close

Nothing here does I/O, owns a clock or takes a lock. The owner (one rank of a prefill server) guards its reserve and all
ledgers on it with one lock, and passes the time in.
"""

from sglang_dualpath.ledger.ledger import Ledger
from sglang_dualpath.ledger.reserve import Reserve
from sglang_dualpath.ledger.types import (
    End,
    Expired,
    Grant,
    Landed,
    LedgerStatistics,
    Refusal,
    RefusalReason,
    Share,
    Source,
    Swap,
)

__all__ = [
    "End",
    "Expired",
    "Grant",
    "Landed",
    "Ledger",
    "LedgerStatistics",
    "Refusal",
    "RefusalReason",
    "Reserve",
    "Share",
    "Source",
    "Swap",
]
