"""Threads that wait for transfers give way to threads that compute."""

from __future__ import annotations

import logging
import os
import threading

logger = logging.getLogger(__name__)

# A thread with this many more has a third (a tenth) of the weight of an ordinary one where both want the same core.
# Without others that want it, nothing changes.
PUSHING = 5
READING = 10
_LOWEST = 19


def give_way(by: int) -> None:
    """Run the calling thread ``by`` nice levels below its process.

    Mooncake waits for a transfer by asking for its status in a loop: measured on a machine with two cores, a thread
    that reads from its store takes a whole core, whatever the link carries. On Linux a nice value belongs to a thread,
    and is inherited from the one that starts it. A process without privileges cannot give a thread back what it
    inherited: a pusher that a reader started then stays at the reader's.
    """
    try:
        usual = os.getpriority(os.PRIO_PROCESS, os.getpid())
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(_LOWEST, usual + by))
    except OSError:
        logger.debug("Thread %s keeps its priority.", threading.current_thread().name, exc_info=True)
