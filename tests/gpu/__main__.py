"""List the checks, then run them: `python -m tests.gpu [-k PATTERN]`."""

from __future__ import annotations

import argparse
import sys
import unittest
from collections.abc import Iterator

from tests.gpu import machine, pool_checks, server_checks

MODULES = (pool_checks, server_checks)


def checks_of(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    """All test cases of a suite, in the order in which they run."""
    for part in suite:
        if isinstance(part, unittest.TestSuite):
            yield from checks_of(part)
        else:
            yield part


def load(patterns: list[str] | None = None) -> unittest.TestSuite:
    """The checks whose names match one of the patterns; all of them without."""
    loader = unittest.TestLoader()
    loader.testNamePatterns = [text if "*" in text else f"*{text}*" for text in patterns] if patterns else None
    return unittest.TestSuite(loader.loadTestsFromModule(module) for module in MODULES)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if no check failed, also where none can run."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description="What only a CUDA device can show.")
    parser.add_argument("-k", dest="patterns", action="append", metavar="PATTERN", help="only checks named like this")
    options = parser.parse_args(arguments)
    suite = load(options.patterns)
    checks = list(checks_of(suite))
    if not checks:
        parser.error(f"no check is named like {' or '.join(options.patterns)}")
    print("What only a CUDA device can show:")
    for check in checks:
        print(f"  {check.id().rpartition('.')[2]}: {check.shortDescription()}")
    reason = machine.missing()
    if reason is not None:
        print(f"\n{reason}")
        for check in checks:
            print(f"  {check.id().rpartition('.')[2]}: skipped")
        return 0
    print(f"\nServers and hops use {machine.engine()}; logs of servers go to out/gpu.\n", flush=True)
    result = unittest.TextTestRunner(stream=sys.stdout, verbosity=2).run(suite)
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    raise SystemExit(main())
