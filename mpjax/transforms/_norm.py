"""Norms that half-precision trees cannot overflow."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mpjax._compat import is_tracer
from mpjax._dtypes import FLOAT32, is_float8
from mpjax._errors import problem
from mpjax._tree import cast_leaf, is_float_leaf, is_inexact_leaf, map_inexact, widen
from mpjax._typing import Scalar, Tree


def global_norm(tree: Tree) -> Scalar:
    """The Euclidean norm of all numbers in a tree, computed in float32 or wider.

    On float32 trees it is `optax.tree.norm`, expression for expression, so XLA computes the two once. In float16
    that one is inf from 256 on, and in bfloat16 a sum stops growing at 256 terms.

    Args:
      tree: any pytree. Integers, booleans, PRNG keys, `None` and float0 leaves do not count.

    Returns:
      A float32 array of shape (): of one shard under `shard_map`, of the whole tree under `jit`.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> float(mp.transforms.global_norm({"w": jnp.full(4, 300.0, jnp.float16)}))
    600.0
    """
    leaves = [x for x in jax.tree.leaves(widen(tree)) if is_inexact_leaf(x)]
    # fp8 leaves are never cast elsewhere, but their squares overflow from 21 on.
    return optax.tree.norm([x.astype(FLOAT32) if is_float8(x.dtype) else x for x in leaves])


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Like `optax.clip_by_global_norm`, with the norm and the division in float32 for half-precision trees.

    Each leaf keeps its dtype. Inside `mpjax.loss_scaled` and `mpjax.skip_on_overflow`, gradients are float32
    already and optax's own does the same.

    Args:
      max_norm: the largest norm to let through unchanged, above 0.

    Raises:
      ValueError: `max_norm` is not above 0.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> clip = mp.transforms.clip_by_global_norm(1.0)
    >>> clip.update({"w": jnp.full(4, 300.0, jnp.float16)}, clip.init(None))[0]
    {'w': Array([0.5, 0.5, 0.5, 0.5], dtype=float16)}
    """
    if not is_tracer(max_norm) and not max_norm > 0:
        raise ValueError(
            problem(f"max_norm is {max_norm}.", expected="a number above 0", write="clip_by_global_norm(1.0)")
        )

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        del params
        norm = global_norm(updates)

        def clip(x: Any) -> Any:
            # Divided first, as optax does: max_norm / norm would lose a tiny norm's digits.
            x = jnp.asarray(x)
            return jnp.where(norm < max_norm, x, x / norm.astype(x.dtype) * max_norm)

        clipped = map_inexact(clip, updates)
        return jax.tree.map(
            lambda new, old: cast_leaf(new, old.dtype) if is_float_leaf(old) else new, clipped, updates
        ), state

    return optax.GradientTransformation(optax.init_empty_state, update)
