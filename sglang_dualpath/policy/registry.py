"""Finds a policy by its name: a builtin one, a third party's, or any class that can be imported."""

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from sglang_dualpath.policy.types import BalancingPolicy

ENTRY_POINT_GROUP = "sglang_dualpath.policies"
DEFAULT_POLICY = "split"

# Listed here and not only as entry points: they must be found in a source tree that was never installed, and nobody
# else's distribution may take their names.
BUILTIN_POLICIES = {
    "prefill": "sglang_dualpath.policy.prefill:PrefillPolicy",
    "decode": "sglang_dualpath.policy.decode:DecodePolicy",
    "shorter_queue": "sglang_dualpath.policy.shorter_queue:ShorterQueuePolicy",
    "split": "sglang_dualpath.policy.split:SplitPolicy",
}


class PolicyError(ValueError):
    """A policy is named but cannot be used: its module, its class, or an instance of it is not to be had."""


class UnknownPolicyError(PolicyError):
    """Nothing goes by that name. The text lists what does."""


def known_policies() -> dict[str, str]:
    """Names that `load_policy` takes, each with its `package.module:Class`; builtin ones first, then by name."""
    others = {point.name: point.value for point in _entry_points()}
    return BUILTIN_POLICIES | {name: others[name] for name in sorted(others) if name not in BUILTIN_POLICIES}


def load_policy(name: str) -> BalancingPolicy:
    """Return a new policy: `name` is a builtin name, one of the entry-point group, or `package.module:Class`.

    Raises UnknownPolicyError for a name that is none of these, PolicyError for one that leads to nothing usable.
    """
    known = known_policies()
    target = known.get(name)
    if target is None:
        if ":" not in name:
            names = ", ".join(known)
            raise UnknownPolicyError(f"no policy is called {name!r}: use one of {names}, or package.module:Class")
        target = name
    policy = _instantiate(_import_class(target))
    if not isinstance(policy, BalancingPolicy) or not callable(policy.plan):
        raise PolicyError(f"{target} is no policy: it needs an attribute needs_decode and a method plan(read, view)")
    return policy


def _entry_points() -> list[EntryPoint]:
    # By value, so that two distributions that take the same name give the same winner in every process.
    return sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.value)


def _import_class(target: str) -> type:
    module_name, _, class_name = target.partition(":")
    if not module_name or module_name.startswith(".") or not class_name:
        raise PolicyError(f"{target!r} does not name a class: write package.module:Class")
    try:
        module = import_module(module_name)
    except Exception as error:  # a third party's module may raise anything while it is imported
        raise PolicyError(f"the module of policy {target} cannot be imported: {error}") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise PolicyError(f"module {module_name} has no class {class_name}")
    return found


def _instantiate(policy_class: type) -> object:
    try:
        policy: object = policy_class()
    except Exception as error:  # see above
        raise PolicyError(f"policy {policy_class.__qualname__} cannot be created without arguments: {error}") from error
    return policy
