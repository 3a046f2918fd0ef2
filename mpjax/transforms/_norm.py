"""Norms that half-precision trees cannot overflow."""

from typing import Any

import jax
import optax

from mpjax._tree import cast_leaf, is_inexact_leaf, widen
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
    return optax.tree.norm([x for x in jax.tree.leaves(widen(tree)) if is_inexact_leaf(x)])


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Like `optax.clip_by_global_norm`, with the norm and the division in float32 for half-precision trees.

    Each leaf keeps its dtype. Inside `mpjax.loss_scaled` and `mpjax.skip_on_overflow`, gradients are float32
    already and optax's own does the same.

    Args:
      max_norm: the largest norm to let through unchanged.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> clip = mp.transforms.clip_by_global_norm(1.0)
    >>> clip.update({"w": jnp.full(4, 300.0, jnp.float16)}, clip.init(None))[0]
    {'w': Array([0.5, 0.5, 0.5, 0.5], dtype=float16)}
    """
    clip = optax.clip_by_global_norm(max_norm)

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        del params
        clipped, state = clip.update(widen(updates), state)
        return jax.tree.map(lambda new, old: cast_leaf(new, old.dtype), clipped, updates), state

    return optax.GradientTransformation(clip.init, update)
