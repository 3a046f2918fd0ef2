"""`record_amax`: the largest number in each module, at every step, as one small vector beside the result."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._autocast._tables import ROWS, Kind
from mpjax._compat import inner_jaxprs, is_tracer
from mpjax._errors import problem
from mpjax._path_patterns import check_pattern, matches_path
from mpjax._state import register_state
from mpjax.diagnostics._taps import Taps, tapped
from mpjax.diagnostics._traced import trace


@register_state("values")
@dataclasses.dataclass(frozen=True)
class Amaxes:
    """The largest magnitude in each module, as `record_amax` returns it: one array, and what its numbers are of.

    A pytree with one leaf: it goes through `jit`, `scan` and `vmap`, which may put dimensions in front.

    Attributes:
      values: float32 of shape (entries,). Infinity or NaN stands for one anywhere in the module.
      paths: the module of each entry, as name scopes give it, in the order of the program; empty outside of modules.
      directions: `"forward"` or `"backward"`, of each entry.
      dtypes: the dtype of the numbers, of each entry.
    """

    values: Any
    paths: tuple[str, ...]
    directions: tuple[str, ...]
    dtypes: tuple[str, ...]

    def to_dict(self) -> dict[str, float]:
        """Names and numbers, for a log. Not under `jit`.

        >>> import jax.numpy as jnp, mpjax as mp
        >>> Amaxes(jnp.ones(2), ("mlp", "mlp"), ("forward", "backward"), ("float16", "float16")).to_dict()
        {'mlp/forward/float16': 1.0, 'mlp/backward/float16': 1.0}
        """
        return dict(zip(self._names, self._numbers.tolist(), strict=True))

    @property
    def overflowed(self) -> tuple[str, ...]:
        """The entries that hold an infinity or NaN, the first in the program first. Not under `jit`."""
        return tuple(name for name, x in zip(self._names, self._numbers, strict=True) if not np.isfinite(x))

    def __str__(self) -> str:
        """In words: which module overflowed first, and how near the others are to the end of their dtype."""
        if is_tracer(self.values) or not isinstance(self.values, jax.Array | np.ndarray):
            return repr(self)
        found = self.overflowed
        lines = [f"The first to overflow: {found[0]}." if found else "Every module is finite."]
        for name, dtype, x in zip(self._names, self.dtypes, self._numbers, strict=True):
            room = f"{x / float(jnp.finfo(dtype).max):.1%} of {dtype}'s range" if np.isfinite(x) else "overflowed"
            lines.append(f"  {name}: {x:.4g}, {room}")
        return "\n".join(lines)

    @property
    def _names(self) -> list[str]:
        rows = zip(self.paths, self.directions, self.dtypes, strict=True)
        return ["/".join(filter(None, row)) for row in rows]

    @property
    def _numbers(self) -> np.ndarray:
        values = np.asarray(self.values, np.float32)
        # Of several steps or rows, the largest.
        return np.max(values, axis=tuple(range(values.ndim - 1)), initial=0)


def record_amax(
    fn: Callable[..., Any], only: str | None = None, kinds: str = "matmul"
) -> Callable[..., tuple[Any, Amaxes]]:
    """Records the largest magnitude of each module beside a function's result: cheap enough for every step.

    The step is compiled as ever; each recorded operation costs one reduction over its result. Modules are name scopes:
    those of Linen modules, and `jax.named_scope`. Recorded is what the function does, so a gradient function has its
    backward pass recorded too, and a function under `mpjax.autocast` its activations in the compute dtype. Loops give
    the largest of their iterations, `cond` the branch that ran and 0 for the other. What is inside a `custom_vjp` or
    `custom_jvp` counts by its results.

    Numbers are rounded to their dtype first: a compiler that keeps more digits than asked for hides no overflow.

    Args:
      fn: any function of pytrees, such as `mp.value_and_grad(loss_fn, loss_scale)`; of NNX modules the state and the
        graph of `nnx.split`.
      only: a regular expression for whole module paths, such as `".*attention.*"`. Default: all.
      kinds: `"matmul"` for the results of matrix work alone, `"all"` for those of every operation.

    Returns:
      A function of the same arguments that returns `(result, amaxes)`, an `Amaxes`. It takes `jit`, `scan`, `vmap`,
      and `jax.grad` with `has_aux=True`, which records the forward pass.

    Raises:
      ValueError: `kinds` is something else, or `only` no regular expression.
      TypeError: `only` is no string.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> def loss_fn(w, x):
    ...     with jax.named_scope("mlp"):
    ...         return jnp.mean(x @ w)
    >>> step = jax.jit(mp.diagnostics.record_amax(mp.autocast(loss_fn, "mixed_float16")))
    >>> loss, amaxes = step(jnp.full((2, 2), 300.0), jnp.full((2, 2), 200.0))
    >>> print(amaxes)  # doctest: +NORMALIZE_WHITESPACE
    The first to overflow: mlp/forward/float16.
      mlp/forward/float16: inf, overflowed
    """
    if kinds not in ("matmul", "all"):
        raise ValueError(
            problem(f"kinds is {kinds!r}.", expected='"matmul" or "all"', write='record_amax(fn, kinds="all")')
        )
    if only is not None:
        check_pattern(only)

    def wanted(eqn: Any, path: str) -> bool:
        return (kinds == "all" or _is_matrix_work(eqn)) and (only is None or matches_path(only, path))

    @functools.wraps(fn)
    def recorded(*args: Any, **kwargs: Any) -> tuple[Any, Amaxes]:
        traced = trace(fn, args, kwargs)
        outs, taps = tapped(Taps(wanted), traced.jaxpr, traced.consts, traced.arrays)
        values = jnp.stack(list(taps.values())) if taps else jnp.zeros(0, jnp.float32)
        columns = list(zip(*taps, strict=True)) or [(), (), ()]
        return traced.result(outs), Amaxes(values, *columns)

    return recorded


_MATRIX = (*(name for row in ROWS if row.kind is Kind.LOW for name in row.primitives), "float32_tangent")


def _is_matrix_work(eqn: Any) -> bool:
    """Whether an equation is a matrix product or convolution, or a kernel or custom rule that holds one."""
    if eqn.primitive.name in _MATRIX:
        return True
    return any(_is_matrix_work(inner) for jaxpr in inner_jaxprs(eqn) for inner in jaxpr.eqns)
