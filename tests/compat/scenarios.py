"""What forked processes do: SGLang's own command lines and entry points, up to where servers would be started.

Nothing of the package is imported before SGLang loads its plugins.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import types
from pathlib import Path
from typing import Any

from tests.compat.forks import note


def model(directory: str) -> str:
    from benchmarks.testbed.model import small_identity_model

    return str(small_identity_model(Path(directory)))


def launch_server(argv: list[str], shell: str = "python") -> None:
    """`python -m sglang.launch_server ARGV` or `sglang serve ARGV`, reporting instead of starting processes."""
    from sglang.srt.entrypoints import http_server

    def started(server_args: Any, *args: Any, **kwargs: Any) -> None:
        note(state(server_args))

    http_server.launch_server = started
    if shell == "python":
        del sys.modules["sglang.launch_server"]
        sys.argv = ["launch_server.py", *argv]
        runpy.run_module("sglang.launch_server", run_name="__main__")
    else:
        from sglang.cli.main import main

        sys.argv = ["sglang", "serve", *argv]
        main()


def engine(arguments: dict[str, Any]) -> None:
    """`sglang.Engine(**ARGUMENTS)`, reporting when it would start its schedulers."""
    from sglang.srt.entrypoints.engine import Engine

    def started(cls: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
        note(state(server_args))
        os._exit(0)  # an Engine that did not start has nothing to shut down

    Engine._launch_scheduler_processes = classmethod(started)
    Engine(**arguments)


def child() -> dict[str, Any]:
    """What a server's child process finds after its first line."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    return state(None)


def state(server_args: Any) -> dict[str, Any]:
    """What the switch has done to this process, and the server arguments as resolved."""
    from sglang.srt.arg_groups.arg_utils import record_fields
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.plugins.hook_registry import HookRegistry

    report = {
        "hooks": sorted(target for target, hooks in HookRegistry._hooks.items() if hooks),
        "patched": sorted(HookRegistry._patched),
        "modules": sorted(name for name in sys.modules if name.partition(".")[0] == "sglang_dualpath"),
        "environ": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("SGLANG_DUALPATH_", "SGLANG_KV_CONNECTOR"))
        },
    }
    if server_args is not None:
        view = resolved_view(server_args)
        report["arguments"] = {
            field.name: repr(getattr(view, field.name)) for field in record_fields(type(server_args))
        }
    return report


def config() -> dict[str, Any]:
    """The settings that a child process works with."""
    import msgspec
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang_dualpath.config import read_config

    return dict(msgspec.to_builtins(read_config()))


def without_seam(path: str, attribute: str | None, parameters: list[str]) -> None:
    """The plugin in a SGLang that lacks one thing. The switch is in the environment."""
    from tests.compat.breaking import break_seam

    break_seam(path, attribute, parameters)
    from sglang_dualpath.plugin import register

    register()


def hook_fails(target: str) -> None:
    """A scheduler process in which SGLang cannot apply one hook, up to where it makes its tree."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    stock = HookRegistry._apply_target.__func__

    def apply(cls: Any, path: str, hooks: list[Any]) -> None:
        if path == target:
            raise RuntimeError("on purpose")
        stock(cls, path, hooks)

    HookRegistry._apply_target = classmethod(apply)
    load_plugins()
    make_tree("prefill")


def hook_lost(target: str) -> None:
    """A scheduler process in which another plugin takes a place of ours, up to where it makes its tree."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    module, _, name = target.rpartition(".")
    stock = getattr(importlib.import_module(module), name)
    if isinstance(stock, type):
        HookRegistry.register(target, type(name, (stock,), {}), HookType.REPLACE)
    else:
        HookRegistry.register(target, lambda original, *args, **kwargs: original(*args, **kwargs), HookType.AROUND)
    HookRegistry.apply_hooks()
    load_plugins()
    make_tree("prefill")


def special_model(kind: str) -> None:
    """A scheduler process that is about to make the tree of a model with more than one pool."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    make_tree("prefill", **{kind: True})


def make_tree(mode: str, **kinds: bool) -> None:
    """Ask the tree factory that is registered for this package's trees, as the scheduler does."""
    from sglang.srt.mem_cache.registry import get_radix_cache_factory

    factory = get_radix_cache_factory("dualpath")
    assert factory is not None
    factory(types.SimpleNamespace(**{"is_hybrid_swa": False, "is_hybrid_ssm": False, "is_dsa": False} | kinds))
