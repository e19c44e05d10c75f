"""The prefill engine's own readers: threads that read chunks of the reads whose turn it is."""

from __future__ import annotations

import logging
import threading
import time

from sglang_dualpath import metrics
from sglang_dualpath.ledger import Grant
from sglang_dualpath.reader.prefetch import ReadLimit
from sglang_dualpath.reader.prefill import PrefillRead, PrefillReads
from sglang_dualpath.reader.priority import READING, give_way

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.2


class OwnReaders:
    """``count`` threads draining ``reads`` from the back. Storage backends are asked by these threads alone."""

    def __init__(self, reads: PrefillReads, *, count: int, limit: ReadLimit) -> None:
        self._reads = reads
        self._limit = limit
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"dualpath-reader-{number}", daemon=True) for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        give_way(READING)
        while not self._stop.is_set():
            try:
                # Before the claim: whoever ends a read waits for its open claims.
                if self._stop.wait(self._limit.delay_s()):
                    return
                claim = self._reads.next_own_claim(_IDLE_WAIT_S)
                if claim is not None:
                    self._read(*claim)
            except Exception:
                logger.exception("A reader of the prefill engine met an error; it goes on.")
                metrics.FALLBACKS.add(reason="reader_exception")
                self._stop.wait(_IDLE_WAIT_S)  # an error that repeats must not take a core

    def _read(self, read: PrefillRead, grant: Grant) -> None:
        started = time.monotonic()
        good = 0
        try:
            if not read.prefetch.is_cancelled():
                self._limit.spend(grant.pages * self._reads.pages.page_bytes)
                good = read.prefetch.read_pages(grant.first_page - read.prefetch.first_page, grant.slots)
                good = max(0, min(good, grant.pages))
        except Exception:
            # A backend may raise anything; the chunk then is another reader's, or is computed.
            logger.exception("Storage read of %d pages failed for room %s.", grant.pages, read.room)
            metrics.FALLBACKS.add(reason="storage_exception")
        finally:
            self._reads.own_done(read, grant, good, time.monotonic() - started)

    def stop(self) -> None:
        """Ask the threads to end; a read in flight is finished first. Does not wait longer than 2 s for each."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2.0)
