"""Systems side by side in one run: `python -m benchmarks.compare --preset NAME --out DIR`."""
