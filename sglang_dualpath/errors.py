"""What can go wrong, as exceptions.

    DualPathError
    ├── ConfigError          a flag or its environment twin has a value that cannot be used (also a ValueError)
    ├── UnsupportedError     this server's set-up cannot be served by DualPath
    ├── SeamError            this SGLang lacks something that DualPath hooks into
    ├── ControlError         a control socket cannot be opened, or is closed already
    └── TransferError        a push to a peer failed; what arrived of it is unknown
        └── NotPushedError   it failed before any of it was handed to the engine

    ValueError
    ├── PolicyError          a policy cannot be loaded      (defined in sglang_dualpath.policy)
    │   └── UnknownPolicyError   nothing goes by that name  (defined in sglang_dualpath.policy)
    └── ProtocolError        a message is not one of ours   (defined in sglang_dualpath.protocol)

ConfigError, UnsupportedError and SeamError are raised at start, before a request is served; their text is one sentence
that a server prints before it exits. The others are raised while serving, and end in a counted fallback, never in a
failed request.
"""

from collections.abc import Callable

from sglang_dualpath.policy import PolicyError, UnknownPolicyError
from sglang_dualpath.protocol import ProtocolError

__all__ = [
    "DualPathError",
    "ConfigError",
    "UnsupportedError",
    "SeamError",
    "ControlError",
    "TransferError",
    "NotPushedError",
    "PolicyError",
    "UnknownPolicyError",
    "ProtocolError",
]


class DualPathError(Exception):
    """Base of what this package raises about itself."""


class ConfigError(DualPathError, ValueError):
    """A flag or its environment twin has a value that cannot be used. Names the one that was set."""


class UnsupportedError(DualPathError):
    """The server's other flags, its model or its role cannot be combined with DualPath. Says which and why."""


class SeamError(DualPathError):
    """A class, function or attribute of SGLang that DualPath relies on is missing or has changed."""


class ControlError(DualPathError):
    """A control socket cannot be bound, or was used after it was closed."""


class TransferError(DualPathError):
    """A push to a peer failed. The peer must treat the pages that it named as unwritten, or partly written.

    Args:
        over: whether the engine has ended what it began of the push, asked from any thread. By default it has: only an
            engine that cannot call back a write that takes too long has more to say.
    """

    def __init__(self, message: str, *, over: Callable[[], bool] = lambda: True) -> None:
        super().__init__(message)
        self.over = over


class NotPushedError(TransferError):
    """A push was given up before any of it was handed to the engine: the peer's pages are as they were."""
