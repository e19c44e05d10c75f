"""What of SGLang 0.5.23 this package relies on, each with what it is, why it is needed, and when it can go.

A seam is a dotted path to a class, function or method, or (``attribute``) the name of an attribute that a class's own
code sets. ``check`` looks at them all, so a renamed symbol stops the server with a sentence instead of showing as a
request that is never helped. The list itself is in ``catalogue``.
"""

from __future__ import annotations

import dis
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any, NamedTuple

from sglang_dualpath.compat import native
from sglang_dualpath.errors import SeamError

# The package's own requirement says the same; this holds where it was installed with --no-deps.
SUPPORTED_RELEASE = "0.5.23"


class Seam(NamedTuple):
    """One thing of SGLang's that is relied on."""

    path: str
    """Dotted path, resolvable with imports."""
    what: str
    why: str
    remove_when: str
    parameters: tuple[str, ...] = ()
    """Parameter names that our call or override depends on."""
    attribute: str | None = None
    """An attribute that instances of the class at ``path`` have."""
    native: str | None = None
    """The patch (see ``native``) with which SGLang does without our use of this."""

    @property
    def name(self) -> str:
        return f"{self.path}.{self.attribute}" if self.attribute else self.path


def check(seams: Iterable[Seam] | None = None) -> None:
    """Raise SeamError, naming them, unless SGLang is the supported release and has every seam (None: all we know)."""
    if seams is None:
        from sglang_dualpath.compat.catalogue import SEAMS

        seams = SEAMS
    release = importlib.metadata.version("sglang")
    if release.split("+")[0].split(".post")[0] != SUPPORTED_RELEASE:
        raise SeamError(
            f"sglang_dualpath works with SGLang {SUPPORTED_RELEASE}, and {release} is installed; install the release "
            "of sglang_dualpath that names it, or drop --kv-connector."
        )
    missing = [problem for seam in seams if (problem := _problem(seam)) is not None and not _is_native(seam)]
    if missing:
        raise SeamError(
            f"SGLang {release} lacks what sglang_dualpath hooks into ({'; '.join(missing)}), changed by a patch or "
            "another plugin; install stock SGLang, or drop --kv-connector."
        )


def _is_native(seam: Seam) -> bool:
    return seam.native is not None and native.has(seam.native)


def _problem(seam: Seam) -> str | None:
    try:
        found = pkgutil.resolve_name(seam.path)
    except (ImportError, AttributeError):
        return f"{seam.name} is missing"
    if seam.attribute is not None:
        return None if _has_attribute(found, seam.attribute) else f"{seam.name} is missing"
    if seam.parameters:
        known = inspect.signature(inspect.unwrap(found)).parameters
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
        lost = [name for name in seam.parameters if name not in known]
        if lost and not takes_any:
            return f"{seam.name} has no parameter {', '.join(lost)}"
    return None


def _has_attribute(cls: Any, attribute: str) -> bool:
    """Whether instances of ``cls`` get ``attribute``: as a class attribute or field, or set by one of its methods."""
    for base in inspect.getmro(cls):
        if attribute in vars(base) or attribute in inspect.get_annotations(base):
            return True
        for code in _method_codes(base):
            # The names first: looking at instructions takes a hundred times as long.
            if attribute in code.co_names and any(
                step.opname == "STORE_ATTR" and step.argval == attribute for step in dis.get_instructions(code)
            ):
                return True
    return False


def _method_codes(cls: type) -> Iterator[CodeType]:
    for member in vars(cls).values():
        if isinstance(member, property):
            member = member.fget
        code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
        if code is not None:
            yield code
