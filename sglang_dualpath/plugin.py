"""SGLang's entry point: adds the switch, reads it, and installs the rest when it is on.

Without the flag nothing but these two hooks is installed. With it, the main process installs the rest while it parses
its arguments; child processes find the switch in their environment.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
from typing import Any, NoReturn

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_dualpath.config import FLAGS, DualPathConfig, add_arguments, read_config
from sglang_dualpath.errors import DualPathError

logger = logging.getLogger(__name__)

ADD_FLAGS = "sglang.srt.server_args.ServerArgs.add_cli_args"
READ_FLAGS = "sglang.srt.server_args.ServerArgs.from_cli_args"


def register() -> None:
    """Called by SGLang in every process, before it parses arguments."""
    # The switch in the environment: a child of a server that has it, or sglang.Engine(...).
    _switch_on(argparse.Namespace())
    HookRegistry.register(ADD_FLAGS, _add_flags, HookType.AFTER)
    HookRegistry.register(READ_FLAGS, _read_flags, HookType.AROUND)


def _add_flags(result: Any, *args: Any, **kwargs: Any) -> None:
    add_arguments(kwargs["parser"] if "parser" in kwargs else args[-1])


def _read_flags(original: Any, *args: Any, **kwargs: Any) -> Any:
    if _switch_on(kwargs["args"] if "args" in kwargs else args[-1]):
        # SGLang has applied all plugins' hooks by now, so ours must be applied on top.
        HookRegistry.apply_hooks()
    return original(*args, **kwargs)


def _switch_on(arguments: argparse.Namespace) -> bool:
    """Install everything if the switch is on. Ends the process with one sentence if that cannot be."""
    try:
        config = read_config(arguments)
        if config is None:
            return False
        _hand_down(config)
        from sglang_dualpath.compat import prometheus

        with prometheus.undecided():
            _install()
    except DualPathError as error:
        _stop(str(error))
    except Exception as error:
        # Raised in a child, SGLang would log it and go on as stock, with half of our hooks.
        logger.debug("sglang_dualpath could not be set up.", exc_info=True)
        _stop(f"--kv-connector dualpath could not be set up ({type(error).__name__}: {error}).")
    return True


def _stop(sentence: str) -> NoReturn:
    from sglang_dualpath.compat.stop import stop

    stop(sentence)


def _hand_down(config: DualPathConfig) -> None:
    """Leave the settings in the environment for child processes, in place of those that flags have overruled."""
    for flag in FLAGS:
        os.environ.pop(flag.env, None)
    os.environ.update(config.environ())


@functools.cache
def _install() -> None:
    # Imported here: without the flag none of SGLang's engine is imported by this package.
    from sglang_dualpath.compat import seams

    # First: the modules below import what is checked here.
    seams.check()

    from sglang_dualpath.compat import arguments, hooks
    from sglang_dualpath.connector import kv_classes
    from sglang_dualpath.hicache.controller import controller_class
    from sglang_dualpath.hicache.decode import DualPathDecodeTree
    from sglang_dualpath.hicache.prefill import DualPathPrefillTree
    from sglang_dualpath.scheduler.decode_queues import DualPathDecodePreallocQueue, DualPathDecodeTransferQueue
    from sglang_dualpath.scheduler.scheduler import DualPathScheduler

    ours = hooks.Replacements(
        scheduler=DualPathScheduler,
        prealloc_queue=DualPathDecodePreallocQueue,
        transfer_queue=DualPathDecodeTransferQueue,
        controller=controller_class(),
        kv_classes=kv_classes,
        trees={"prefill": DualPathPrefillTree, "decode": DualPathDecodeTree},
    )
    hooks.install(ours)
    arguments.register(functools.partial(hooks.verify, ours), functools.partial(hooks.verify_connector, ours))
