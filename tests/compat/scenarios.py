"""What forked processes do: SGLang's own command lines and entry points, up to where servers would be started.

Nothing of the package is imported before SGLang loads its plugins.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import itertools
import os
import runpy
import sys
import types
from collections.abc import Callable
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


def launch_server_without(package: str, argv: list[str]) -> None:
    """The same where a package is not installed."""
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == package else found(name, *rest)
    launch_server(argv)


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
        "prometheus": "prometheus_client" in sys.modules,
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


def without_each_seam() -> dict[str, tuple[int, str]]:
    """How the plugin ends in a SGLang that lacks one thing, for each thing that is relied on: exit code, and stderr.

    One after another in this process, which is put right in between: nothing is installed before all is checked. The
    switch is in the environment. Then, on top of an installed plugin, the same for what each transfer backend needs.
    """
    from sglang_dualpath.compat.catalogue import CONNECTOR_SEAMS, SEAMS
    from sglang_dualpath.plugin import register

    outcomes = {seam.name: _outcome_without(seam, register) for seam in SEAMS if _needed(seam)}
    from sglang.srt.plugins import load_plugins

    load_plugins()  # all is right again
    for backend, seams in CONNECTOR_SEAMS.items():
        needed = filter(_needed, seams)
        outcomes |= {seam.name: _outcome_without(seam, lambda backend=backend: make_tree(backend)) for seam in needed}
    return outcomes


def _needed(seam: Any) -> bool:
    from sglang_dualpath.compat import native

    return seam.native is None or not native.has(seam.native)


def natives() -> dict[str, bool]:
    """What SGLang is found to offer by itself."""
    from sglang_dualpath.compat import native

    return {name: native.has(name) for name in native._LOOKS}


def _outcome_without(seam: Any, start: Callable[[], None]) -> tuple[int, str]:
    import pytest

    from tests.compat.breaking import break_seam

    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        break_seam(patch, seam.path, seam.attribute, seam.parameters)
        try:
            start()
        except SystemExit as stop:
            return int(stop.code or 0), stderr.getvalue()
        except BaseException as fault:
            return -1, f"{stderr.getvalue()}{fault!r}"
    return 0, stderr.getvalue()


def without_the_other_connector(backend: str, other: str) -> dict[str, list[str]]:
    """A scheduler process whose SGLang lacks all that another transfer backend's connector relies on."""
    import pytest
    from sglang.srt.mem_cache import registry
    from sglang.srt.plugins import load_plugins

    registry.create_unified_radix_cache = lambda ctx, cache_class: None
    load_plugins()
    from sglang_dualpath.compat.catalogue import CONNECTOR_SEAMS
    from tests.compat.breaking import break_seam

    with pytest.MonkeyPatch.context() as patch:
        for seam in reversed(CONNECTOR_SEAMS[other]):  # classes after what is in them
            break_seam(patch, seam.path, seam.attribute, seam.parameters)
        make_tree(backend)
    modules = (f"sglang_dualpath.connector.{name}" for name in CONNECTOR_SEAMS)
    return {"imported": [module for module in modules if module in sys.modules]}


def undeclared() -> dict[str, list[str]]:
    """What this package imports from SGLang, and overrides of its methods, without naming it as a seam."""
    import ast
    import inspect
    import pkgutil

    import sglang_dualpath
    from sglang_dualpath.compat.catalogue import CONNECTOR_SEAMS, SEAMS

    known = [*SEAMS, *itertools.chain.from_iterable(CONNECTOR_SEAMS.values())]
    seams = [pkgutil.resolve_name(seam.path) for seam in known if seam.attribute is None]
    imports, overrides = [], []
    for info in pkgutil.walk_packages(sglang_dualpath.__path__, "sglang_dualpath."):
        module = importlib.import_module(info.name)
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang."):
                for name in node.names:
                    found = getattr(importlib.import_module(node.module or ""), name.name)
                    within = f"{node.module}.{name.name}."
                    if not any(found is seam for seam in seams) and not any(s.path.startswith(within) for s in known):
                        imports.append(f"{info.name}: {node.module}.{name.name}")
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == info.name:
                overrides += [f"{info.name}: {name}" for name in _overrides(cls) if not _declared(cls, name, seams)]
    return {"imports": imports, "overrides": overrides}


def _overrides(cls: type) -> list[str]:
    """Methods of ours that SGLang's part of the class has too."""
    upstream = [base for base in cls.__mro__ if base.__module__.startswith("sglang.")]
    return [
        name
        for name, member in vars(cls).items()
        if callable(member)
        and not (name.startswith("__") and name.endswith("__"))
        and any(name in vars(base) for base in upstream)
    ]


def _declared(cls: type, name: str, seams: list[Any]) -> bool:
    upstream = next(base for base in cls.__mro__ if base.__module__.startswith("sglang.") and name in vars(base))
    return any(getattr(upstream, name) is seam for seam in seams)


def hook_fails(target: str) -> None:
    """A scheduler process in which SGLang cannot apply one hook, up to where it makes its tree."""
    from sglang.srt.plugins import load_plugins

    _break_hook(target)
    load_plugins()
    make_tree()


def hook_fails_in_the_main_process(target: str, argv: list[str]) -> None:
    _break_hook(target)
    launch_server(argv)


def _break_hook(target: str) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    stock = HookRegistry._apply_target.__func__

    def apply(cls: Any, path: str, hooks: list[Any]) -> None:
        if path == target:
            raise RuntimeError("on purpose")
        stock(cls, path, hooks)

    HookRegistry._apply_target = classmethod(apply)


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
    make_tree()


def special_model(kind: str) -> None:
    """A scheduler process that is about to make the tree of a model with more than one pool."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    make_tree(**{kind: True})


def make_tree(backend: str = "mooncake", mode: str = "prefill", **kinds: bool) -> None:
    """Ask the tree factory that is registered for this package's trees, as the scheduler does."""
    from sglang.srt import runtime_context
    from sglang.srt.mem_cache.registry import get_radix_cache_factory

    disagg = types.SimpleNamespace(disaggregation_mode=mode, disaggregation_transfer_backend=backend)
    runtime_context.get_disagg = lambda: disagg
    factory = get_radix_cache_factory("dualpath")
    assert factory is not None
    factory(types.SimpleNamespace(**{"is_hybrid_swa": False, "is_hybrid_ssm": False, "is_dsa": False} | kinds))


def tree(backend: str) -> dict[str, str]:
    """Which tree a scheduler process gets, by its role."""
    from sglang.srt.mem_cache import registry
    from sglang.srt.plugins import load_plugins

    def create(ctx: Any, cache_class: type) -> None:
        made[mode] = cache_class.__name__

    made: dict[str, str] = {}
    registry.create_unified_radix_cache = create
    load_plugins()
    for mode in ("prefill", "decode"):
        make_tree(backend, mode)
    return made
