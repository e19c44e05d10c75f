"""A policy that is switched while servers run, for benchmarks and end-to-end tests: the one named in a file.

Servers import this module, so it imports little.
"""

from __future__ import annotations

import os
from pathlib import Path

from sglang_dualpath.policy import BalancingPolicy, ClusterView, ReadPlan, ReadRequest, load_policy

REPOSITORY = Path(__file__).resolve().parents[1]
_FILE_ENV = "DUALPATH_SWITCHED_POLICY_FILE"


class PolicySwitch:
    """The file that names the policy, and what servers are started with to follow it.

    Whether hit queries wait for what the decode engine holds is asked for once, when a server starts, so the first one
    should need the decode engine; all else is asked for with each read.
    """

    def __init__(self, file: Path, first: str = "split") -> None:
        self._file = file
        self.use(first)

    def use(self, name: str) -> None:
        """From now on servers plan as the policy of this name does."""
        # Renamed into place: a server that reads meanwhile finds the old name or the new one, never none.
        fresh = self._file.with_name(f"{self._file.name}.new")
        fresh.write_text(name)
        fresh.replace(self._file)

    @property
    def flags(self) -> tuple[str, ...]:
        """For the command line of a server."""
        return ("--dualpath-policy", f"{Switchable.__module__}:{Switchable.__qualname__}")

    @property
    def environment(self) -> dict[str, str]:
        """For the environment of a server: where the file is, and where this module is found."""
        search_path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        return {_FILE_ENV: str(self._file), "PYTHONPATH": search_path}


class Switchable:
    """Asks the policy that the file of a :class:`PolicySwitch` names, each time anew."""

    @property
    def needs_decode(self) -> bool:
        return self._current().needs_decode

    @property
    def reads_ahead(self) -> bool:
        return bool(getattr(self._current(), "reads_ahead", False))

    def plan(self, read: ReadRequest, view: ClusterView) -> ReadPlan:
        return self._current().plan(read, view)

    def _current(self) -> BalancingPolicy:
        return load_policy(Path(os.environ[_FILE_ENV]).read_text().strip())
