"""`python -m benchmarks.testbed down`: remove what runs that were killed have left behind."""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks.testbed.state import clean_up, recorded_runs


def main() -> int:
    """List the recorded runs and clean up after dead ones (with --all: also end living ones' processes)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.testbed", description=__doc__)
    parser.add_argument("command", choices=["down", "list"])
    parser.add_argument("--all", action="store_true", help="also runs whose process is alive")
    arguments = parser.parse_args()
    runs = list(recorded_runs())
    if not runs:
        print("No run has left anything behind.")
    for run in runs:
        alive = run.owner_alive and run.owner_pid != os.getpid()
        made = f"{len(run.processes)} processes, {len(run.namespaces)} namespaces, {len(run.links)} links"
        if arguments.command == "list" or (alive and not arguments.all):
            print(f"{run.name}: process {run.owner_pid} {'runs' if alive else 'is gone'}; it recorded {made}.")
            continue
        clean_up(run)
        print(f"{run.name}: removed {made}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
