"""Load for a cluster: agents that replay recorded rounds, and what their requests measured."""

from benchmarks.load.measures import Record, bootstrap_ratio, percentile
from benchmarks.load.replay import Request, play_offline, play_poisson
from benchmarks.load.traces import TraceError
from benchmarks.load.workload import Piece, Round, Trajectory, Workload

__all__ = [
    "Piece",
    "Record",
    "Request",
    "Round",
    "TraceError",
    "Trajectory",
    "Workload",
    "bootstrap_ratio",
    "percentile",
    "play_offline",
    "play_poisson",
]
