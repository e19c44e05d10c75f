"""What owns a run in tests: a process that records a sleeper (and, asked to, networks) and waits to be ended.

`python -m tests.testbed.owner MODE [WORD ...]`: `polite` takes everything down at SIGTERM, `deaf` ignores it, `quits`
ends at once; `detached`, `networks`, `unready` add to that.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.testbed.network import Network, NetworkSpec, NodeSpec
from benchmarks.testbed.processes import Processes
from benchmarks.testbed.runs import UP
from benchmarks.testbed.state import RunState


def main(mode: str, *words: str) -> None:
    if mode == "quits":
        print("no memory for this", flush=True)
        sys.exit(2)
    state = RunState.new()
    directory = Path(tempfile.mkdtemp(prefix=f"{state.name}-"))
    state.add_directory(directory)
    processes = Processes(directory, state)
    processes.start("server", ["sleep", "300"])
    about = {}
    network = None
    if "networks" in words:
        network = Network(NetworkSpec(), (NodeSpec("server"),), state)
        network.up()
        about = {"fabric": network.fabric, "links": [[*key, port] for key, port in network.ports.items()]}
    state.describe(command=UP, urls={"server": "http://127.0.0.1:1"}, log_dir=str(directory), **about)
    try:  # from here on: the test may end this process as soon as it has read that it is ready
        signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "deaf" else signal.default_int_handler)
        state.describe(detached="detached" in words, ready="unready" not in words)
        print("owner is ready", flush=True)
        time.sleep(300)
    except KeyboardInterrupt:
        processes.close(grace_s=0.2)
        if network is not None:
            network.close()
        state.discard()


if __name__ == "__main__":
    main(*sys.argv[1:])
