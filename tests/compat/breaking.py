"""Takes things out of SGLang, as a patch to it would: a symbol, a parameter, an attribute that a class sets."""

from __future__ import annotations

import enum
import functools
import inspect
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

import pytest


def break_seam(patch: pytest.MonkeyPatch, path: str, attribute: str | None, parameters: Sequence[str]) -> None:
    """Remove the seam: its attribute if it is one, else its first parameter if it names some, else the symbol."""
    if attribute is not None:
        rename_attribute(patch, pkgutil.resolve_name(path), attribute)
    elif parameters:
        rename_parameter(patch, path, parameters[0])
    else:
        remove(patch, path)


def remove(patch: pytest.MonkeyPatch, path: str) -> None:
    """Delete the symbol where it is defined, which for a method may be a base class, or several."""
    holder, name = _place(path)
    if inspect.isclass(holder) and issubclass(holder, enum.Enum):
        # Members cannot be deleted, so another enumeration takes its place.
        left = {member.name: member.value for member in holder if member.name != name}
        patch.setattr(sys.modules[holder.__module__], holder.__name__, enum.Enum(holder.__name__, left))
        return
    for base in inspect.getmro(holder) if inspect.isclass(holder) else [holder]:
        if name in vars(base):
            patch.delattr(base, name)


def rename_parameter(patch: pytest.MonkeyPatch, path: str, parameter: str) -> None:
    """Put a function without ``parameter`` in its place; functions and methods alike."""
    holder, name = _place(path)
    stock = inspect.unwrap(getattr(holder, name))
    signature = inspect.signature(stock)
    kept = [
        one.replace(name=f"{one.name}_renamed") if one.name == parameter else one
        for one in signature.parameters.values()
        if one.kind is not inspect.Parameter.VAR_KEYWORD
    ]

    def changed(*args: Any, **kwargs: Any) -> Any:
        return stock(*args, **kwargs)

    changed.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    patch.setattr(holder, name, changed)


def rename_attribute(patch: pytest.MonkeyPatch, cls: type, attribute: str) -> None:
    """Rename the attribute wherever ``cls`` or a base of it sets or declares it."""
    for base in inspect.getmro(cls):
        if base is object:
            continue
        if attribute in inspect.get_annotations(base):
            patch.delitem(base.__annotations__, attribute)
        if attribute in vars(base):
            patch.delattr(base, attribute)
        for member in list(vars(base).values()):
            function = member.fget if isinstance(member, property) else member
            function = inspect.unwrap(function) if callable(function) else function
            if hasattr(function, "__func__"):
                function = function.__func__
            code = getattr(function, "__code__", None)
            if code is None or isinstance(function, functools.partial) or attribute not in code.co_names:
                continue
            names = tuple(f"{name}_renamed" if name == attribute else name for name in code.co_names)
            patch.setattr(function, "__code__", code.replace(co_names=names))


def _place(path: str) -> tuple[Any, str]:
    holder, _, name = path.rpartition(".")
    return pkgutil.resolve_name(holder), name
