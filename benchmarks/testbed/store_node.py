"""A process that lends memory to a Mooncake store and does nothing else: `python -m benchmarks.testbed.store_node`."""

from __future__ import annotations

import argparse
import signal
import sys
import threading

READY_LINE = "store node ready"


def main() -> int:
    """Mount one segment in the store and wait for SIGTERM; 1 when the master refuses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--master", required=True, help="HOST:PORT of mooncake_master")
    parser.add_argument("--address", required=True, help="address of this node on the storage network")
    parser.add_argument("--segment-bytes", type=int, required=True)
    arguments = parser.parse_args()

    from mooncake.store import MooncakeDistributedStore

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    store = MooncakeDistributedStore()
    buffer_bytes = 16 * 1024 * 1024  # for copies of its own, of which it makes none
    status = store.setup(
        arguments.address, "P2PHANDSHAKE", arguments.segment_bytes, buffer_bytes, "tcp", "", arguments.master
    )
    if status != 0:
        print(f"The master at {arguments.master} refused the segment (status {status}).", file=sys.stderr)
        return 1
    print(READY_LINE, flush=True)
    ended.wait()
    store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
