"""Replacing a symbol of SGLang, or ending the process with one clear sentence."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

Wrapper = Callable[[Any], Any]


def resolve(module_name: str, path: str) -> tuple[Any, str, Any]:
    """Find a symbol, return ``(owner, attribute, value)``.

    Args:
        module_name: Module below SGLang that defines the symbol.
        path: Dotted path in the module, as ``Class.method`` or ``function``.

    Raises:
        SystemExit: The module or the symbol does not exist.
    """
    try:
        owner: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise SystemExit(f"sglang_cpu_platform needs SGLang's module {module_name}: {error}.") from error
    *parents, attribute = path.split(".")
    try:
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, attribute, getattr(owner, attribute)
    except AttributeError as error:
        raise SystemExit(
            f"sglang_cpu_platform replaces {module_name}.{path}, which this SGLang lacks: it needs SGLang 0.5.23."
        ) from error


def wrap(module_name: str, path: str, wrapper: Wrapper) -> None:
    """Replace a symbol by ``wrapper(symbol)``, once: a second call for the same symbol changes nothing.

    Raises:
        SystemExit: The module or the symbol does not exist.
    """
    owner, attribute, original = resolve(module_name, path)
    if getattr(original, "_sglang_cpu_platform", False):
        return
    replacement = wrapper(original)
    replacement._sglang_cpu_platform = True
    setattr(owner, attribute, replacement)


def assign(module_name: str, path: str, value: Any) -> None:
    """Set an existing constant.

    Raises:
        SystemExit: The module or the symbol does not exist.
    """
    owner, attribute, _ = resolve(module_name, path)
    setattr(owner, attribute, value)
