"""Who reads a request's pages: `plan(read, view)`, pure and deterministic, one module per policy."""

from sglang_dualpath.policy.registry import (
    BUILTIN_POLICIES,
    DEFAULT_POLICY,
    PolicyError,
    UnknownPolicyError,
    known_policies,
    load_policy,
)
from sglang_dualpath.policy.types import (
    DEFAULT_CHUNK_BYTES,
    BalancingPolicy,
    ClusterView,
    EngineId,
    EngineView,
    ReadEnd,
    ReadPlan,
    ReadRequest,
    ReadShare,
    Role,
    prefill_alone,
    validate_plan,
)

__all__ = [
    "BUILTIN_POLICIES",
    "DEFAULT_CHUNK_BYTES",
    "DEFAULT_POLICY",
    "BalancingPolicy",
    "ClusterView",
    "EngineId",
    "EngineView",
    "PolicyError",
    "ReadEnd",
    "ReadPlan",
    "ReadRequest",
    "ReadShare",
    "Role",
    "UnknownPolicyError",
    "known_policies",
    "load_policy",
    "prefill_alone",
    "validate_plan",
]
