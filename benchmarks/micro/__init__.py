"""Microbenchmarks of the parts: `python -m benchmarks.micro NAME [--json]`; see docs/microbenchmarks.md.

ledger    claims and landings per second
control   round trips over the control sockets
hop       bandwidth of the hop against the bare transport
cpu       CPU seconds per GB on both sides of the hop
decode    time between tokens of a decode server while it helps to load prompts
"""
