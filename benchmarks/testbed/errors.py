"""Errors of the testbed.

TestbedError
 ├─ RequirementError   something this machine lacks (root, iproute2, memory, a program)
 ├─ NetworkError       an `ip` or `tc` command failed
 ├─ ProcessError       a process died or was not ready in time; carries the end of its log
 └─ RequestError       a server answered with an error, or not at all
"""

from __future__ import annotations


class TestbedError(RuntimeError):
    """Base of everything the testbed raises on purpose."""

    __test__ = False  # the name starts with "Test", which pytest would collect


class RequirementError(TestbedError):
    """The machine lacks what was asked for; the message is one sentence for the user."""


class NetworkError(TestbedError):
    """An `ip` or `tc` command failed. What it had built so far is still recorded and removed by `close`."""


class ProcessError(TestbedError):
    """A process ended early or did not become ready before its deadline."""


class RequestError(TestbedError):
    """A request failed: an HTTP error, an unreadable answer, or none before the deadline."""
