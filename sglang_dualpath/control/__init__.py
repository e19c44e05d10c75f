"""Control sockets between decode and prefill engines: ZMQ, one owner thread a socket, all messages authenticated."""

from sglang_dualpath.control.client import ControlClient
from sglang_dualpath.control.loop import ControlErrorKind, Peer
from sglang_dualpath.control.server import ControlServer

__all__ = ["ControlClient", "ControlErrorKind", "ControlServer", "Peer"]
