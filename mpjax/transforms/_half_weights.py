"""What the transforms share that keep weights in half precision or fp8: which leaves, and what an optimizer sees."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpjax._errors import listing, problem
from mpjax._tree import is_float_leaf, path_name
from mpjax._typing import Tree
from mpjax.transforms._stored import update_to

# The dtypes that `_rounding` rounds to.
_LOW = {jnp.dtype(name) for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")}


def is_low(x: Any) -> bool:
    """Whether a leaf is a weight of 16 bits or fewer."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) and x.dtype in _LOW


def keep_low(keep: Any, params: Tree, *rest: Tree) -> Tree:
    """A tree of `keep(param, ...)` for the low leaves, with `optax.MaskedNode()`, which has no leaf, for all others."""
    return jax.tree.map(lambda p, *others: keep(p, *others) if is_low(p) else optax.MaskedNode(), params, *rest)


def updates_to(params: Tree, weights: Tree, steps: Tree) -> Tree:
    """Float32 updates that take low leaves to `weights`, and the optimizer's own steps for all others."""
    return jax.tree.map(lambda p, new, step: update_to(p, new) if is_low(p) else step, params, weights, steps)


def check_weights(params: Tree, name: str, refused: tuple[str, ...] = (), instead: str = "") -> None:
    """Raises a ValueError if the transform called `name` has nothing to do for `params`, or cannot do it.

    Args:
      params: what its init got.
      name: the transform's, for the message.
      refused: names of low dtypes that it cannot store.
      instead: the line to write for those.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    wrong = [f"{path_name(path) or '<root>'}: {x.dtype}" for path, x in leaves if is_low(x) and str(x.dtype) in refused]
    if wrong:
        raise ValueError(
            problem(
                f"mp.transforms.{name} has parameters that it cannot store:\n{listing(wrong)}",
                expected=f"no parameter in {' or '.join(refused)}",
                write=instead,
            )
        )
    floats = Counter(str(x.dtype) for _, x in leaves if is_float_leaf(x) or is_low(x))
    if floats and not any(is_low(x) for _, x in leaves):
        seen = ", ".join(f"{count} in {dtype}" for dtype, count in floats.items())
        raise ValueError(
            problem(
                f"mp.transforms.{name} sees no parameter in half precision: {seen}.",
                expected="parameters stored in bfloat16, and the transform directly inside mp.loss_scaled or "
                "mp.skip_on_overflow: these show all others, optax.chain too, parameters in float32",
                write=f"mp.loss_scaled(mp.transforms.{name}(optax.chain(...)), loss_scale), and "
                "tx.init(policy.cast_to_param(params))",
            )
        )


def check_update(params: Tree, name: str, kept: Tree) -> None:
    """Raises a ValueError on update without the parameters, or with other dtypes than init saw.

    Args:
      params: what its update got.
      name: the transform's, for the message.
      kept: the tree in its state that `keep_low` made.
    """
    check_given(params, name)
    rows = []

    def check(path: Any, param: Any, node: Any) -> None:
        if is_low(param) == isinstance(node, optax.MaskedNode):
            rows.append(f"{path_name(path) or '<root>'}: {getattr(param, 'dtype', type(param).__name__)}")

    jax.tree_util.tree_map_with_path(check, params, kept)
    if rows:
        raise ValueError(
            problem(
                f"mp.transforms.{name} was updated with other dtypes than tx.init saw, at\n{listing(rows)}",
                expected="the parameters that tx.init saw, in their dtypes",
                write="tx.init(params) and tx.update(grads, opt_state, params), with params as they are stored",
            )
        )


def check_given(params: Tree, name: str) -> None:
    """Raises a ValueError on update without the parameters."""
    if params is None:
        raise ValueError(
            problem(
                f"mp.transforms.{name} was updated without the parameters.",
                expected="the parameters, which it has to round",
                write="tx.update(grads, opt_state, params)",
            )
        )
