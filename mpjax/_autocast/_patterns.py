"""Patterns of several equations that a rule for one primitive cannot see."""

from collections.abc import Callable
from typing import Any

from mpjax import _compat
from mpjax._autocast._context import is_subject
from mpjax._autocast._reads import Reads
from mpjax._autocast._rules import Rules
from mpjax._autocast._softmax import probabilities
from mpjax._autocast._tables import Kind
from mpjax._compat import inner_jaxprs, is_literal

# What may lie between a softmax and the matrix work that reads it: dropout, and moving values about.
_BETWEEN = ("mul", "div", "select_n", "transpose", "reshape", "broadcast_in_dim", "squeeze")
# What may lie between a maximum and its subtraction: guards against infinities, and moving values about.
_TO_SHIFT = ("broadcast_in_dim", "stop_gradient", "max", "reshape", "expand_dims", "select_n", "is_finite")


def is_shift(eqn: Any, reads: Reads) -> bool:
    """Recognises x - max(x), the start of every softmax and logsumexp: its last digits become factors."""
    if eqn.primitive.name != "sub":
        return False
    x, maximum = eqn.invars
    return any(
        source.primitive.name == "reduce_max" and source.invars[0] is x for source in reads.sources(maximum, _TO_SHIFT)
    )


def match_softmax(rules: Rules, eqn: Any, reads: Reads) -> Callable[[Any], Any] | None:
    """Recognises exp(z) / sum(exp(z)) that only matrix work reads, as in attention."""
    if eqn.primitive.name != "div" or not reads.only_by(rules, eqn, (Kind.LOW,), _BETWEEN):
        return None
    exp = reads.made_by(eqn.invars[0], "exp")
    spread = reads.made_by(eqn.invars[1], "broadcast_in_dim")
    total = spread and reads.made_by(spread.invars[0], "reduce_sum")
    if not exp or not total or total.invars[0] is not eqn.invars[0] or is_literal(exp.invars[0]):
        return None
    axes = total.params["axes"]
    # The sums have to stand where they were taken: x / x.sum(0)[:, None] of a square x is no softmax.
    if spread.params["broadcast_dimensions"] != tuple(i for i in range(eqn.outvars[0].aval.ndim) if i not in axes):
        return None
    shift = reads.made_by(exp.invars[0], "sub")
    logits = shift.invars[0] if shift is not None and is_shift(shift, reads) else exp.invars[0]
    on_tpu = _compat.target_platform() == "tpu"
    return lambda dtype: probabilities(reads.values[logits].array, axes, dtype, on_tpu)


def is_softmax_input(eqn: Any, reads: Reads) -> bool:
    """Whether a softmax or logsumexp is all that reads a result: its maximum, and its difference from that."""
    readers = reads.readers.get(eqn.outvars[0], [])
    return any(r is not None and is_shift(r, reads) for r in readers) and all(
        r is not None and (r.primitive.name == "reduce_max" or is_shift(r, reads)) for r in readers
    )


def is_half_of_a_pair(eqn: Any, reads: Reads) -> bool:
    """Recognises x[::2] where x[1::2] is taken too, as `jax.lax.associative_scan` does at each level."""
    strides = eqn.params.get("strides")
    if eqn.primitive.name != "slice" or not strides or max(strides) < 2:
        return False
    return any(
        r is not None
        and r.primitive.name == "slice"
        and r.params["strides"] == strides
        and r.params["start_indices"] != eqn.params["start_indices"]
        for r in reads.readers.get(eqn.invars[0], [])
    )


def is_lookup(eqn: Any) -> bool:
    """Recognises rows taken from a table, `table[tokens]` or `jnp.take`, as an embedding does."""
    if eqn.primitive.name != "jit":
        return eqn.primitive.name == "gather"
    inner = [e for jaxpr in inner_jaxprs(eqn) for e in jaxpr.eqns]
    makers = [e for e in inner if any(is_subject(var.aval) for var in e.outvars)]
    return bool(makers) and all(map(is_lookup, makers))
