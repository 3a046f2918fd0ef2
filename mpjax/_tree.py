"""Maps over the float leaves of a tree, finite checks, selection and readable paths."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax._compat import is_float0
from mpjax._dtypes import is_castable, wide_dtype
from mpjax._errors import listing, problem
from mpjax._typing import Scalar, T, Tree


def is_float_leaf(x: Any) -> bool:
    """Whether `x` is an array that casts apply to: real, floating, 16 bits or wider."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) and is_castable(x.dtype)


def is_inexact_leaf(x: Any) -> bool:
    """Whether `x` is a number with a gradient: floating or complex, Python's own included."""
    if isinstance(x, float | complex):
        return True
    return hasattr(x, "dtype") and not is_float0(x) and bool(jnp.issubdtype(x.dtype, jnp.inexact))


def cast_leaf(x: Any, dtype: np.dtype[Any]) -> Any:
    """Casts one leaf, or returns the very same object when there is nothing to cast."""
    if not is_float_leaf(x) or x.dtype == dtype:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=dtype)
    return x.astype(dtype)


def cast_floats(tree: T, dtype: np.dtype[Any]) -> T:
    """Casts the float leaves of `tree`; every other leaf is returned as it is."""
    return jax.tree.map(lambda x: cast_leaf(x, dtype), tree)


def widen(tree: T) -> T:
    """Casts float leaves narrower than float32 to float32, Python's numbers included; all others stay."""

    def one(x: Any) -> Any:
        if isinstance(x, float | complex) and not isinstance(x, np.generic):
            return jnp.asarray(x)
        return cast_leaf(x, wide_dtype(x.dtype)) if is_float_leaf(x) else x

    return jax.tree.map(one, tree)


def map_inexact(fn: Callable[[Any], Any], tree: T) -> T:
    """Applies `fn` to floating and complex leaves, in float32 or wider; fp8 leaves and all others stay."""

    def one(x: Any) -> Any:
        if not is_inexact_leaf(x):
            return x
        if isinstance(x, float | complex):
            return fn(x)
        is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
        return fn(x if is_complex else widen(x)) if is_complex or is_float_leaf(x) else x

    return jax.tree.map(one, tree)


def path_name(path: tuple[Any, ...], keep_value: bool = False) -> str:
    """Writes a tree path as `"encoder/layers/0/kernel"`, the same for dicts, Linen and NNX.

    The `.value` that `nnx.Variable` and Linen's `Partitioned` boxes put at the end is left out, unless asked for.
    """
    if not keep_value and path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def instances(tree: Tree, kinds: type[Any] | tuple[type[Any], ...]) -> list[tuple[tuple[Any, ...], Any]]:
    """The things of some types in a tree, each with its path. What one of them has inside is not looked at."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, kinds))
    return [(path, x) for path, x in leaves if isinstance(x, kinds)]


def all_finite(tree: Tree) -> Scalar:
    """Whether every number in a tree is finite: no inf, no NaN.

    Exact: the largest finite value of a dtype counts as finite. Leaves that cannot be non-finite (integers,
    booleans, PRNG keys, `None`, float0) count as finite, and so does an empty tree.

    Args:
      tree: any pytree of arrays or Python numbers.

    Returns:
      A bool array of shape ().

    >>> import jax.numpy as jnp, mpjax as mp
    >>> bool(mp.all_finite({"w": jnp.ones(3), "step": 7, "rng": None}))
    True
    >>> bool(mp.all_finite({"w": jnp.array([1.0, jnp.inf])}))
    False
    """
    flags = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if is_inexact_leaf(x)]
    return functools.reduce(operator.and_, flags, jnp.asarray(True))


def agreed(flag: Any, axis_name: str | Sequence[str] | None) -> Scalar:
    """A flag that is true where it is so on all devices along the axes; as it is where there are none."""
    # An integer, since collectives take no booleans.
    return flag if axis_name is None else jax.lax.pmin(flag.astype(jnp.int32), axis_name) == 1


def check_flag(pred: Any, what: str) -> Scalar:
    """Returns `pred` as a bool array of shape (), or raises an error that says what it was."""
    shape, dtype = _shape_and_dtype(pred)
    if shape != () or dtype != jnp.bool_:
        described = f"is a {type(pred).__name__}" if dtype is None else f"has shape {shape} and dtype {dtype}"
        raise TypeError(
            problem(
                f"{what} {described}.",
                expected="one boolean: shape () and dtype bool",
                write="mp.all_finite(grads)",
            )
        )
    return jnp.asarray(pred)


def _shape_and_dtype(x: Any) -> tuple[Any, Any]:
    """Shape and dtype of a leaf, (None, None) for what is neither array nor number."""
    if isinstance(x, bool | int | float | complex):
        return (), jnp.result_type(x)
    return getattr(x, "shape", None), getattr(x, "dtype", None)


def select_tree(pred: Any, on_true: T, on_false: T) -> T:
    """Returns one of two trees, leaf by leaf, without a branch: what an overflow step uses to stand still.

    It selects and never multiplies, so an inf or NaN on the side not taken leaves no trace.

    Args:
      pred: a boolean of shape ().
      on_true: the tree returned where `pred` is true.
      on_false: the tree returned elsewhere: same structure, shapes and dtypes.

    Raises:
      TypeError: `pred` is not one boolean, or two leaves differ in dtype or shape or are no arrays (all are listed).
      ValueError: the structures differ.

    >>> import jax.numpy as jnp, mpjax as mp
    >>> kept = mp.select_tree(jnp.array(False), {"w": jnp.array([jnp.nan])}, {"w": jnp.array([1.0])})
    >>> kept["w"]
    Array([1.], dtype=float32)
    """
    pred = check_flag(pred, "pred")
    check_same_structure(on_true, on_false, "on_true", "on_false")
    bad = []
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(on_true), jax.tree.leaves(on_false), strict=True):
        (shape_a, dtype_a), (shape_b, dtype_b) = _shape_and_dtype(a), _shape_and_dtype(b)
        name = path_name(path) or "<root>"
        if dtype_a is None or dtype_b is None:
            bad.append(f"{name}: {type(a).__name__} against {type(b).__name__}, not arrays")
        elif (shape_a, dtype_a) != (shape_b, dtype_b):
            bad.append(f"{name}: {dtype_a}{shape_a} against {dtype_b}{shape_b}")
    if bad:
        raise TypeError(
            problem(
                f"the two trees differ in dtype or shape at\n{listing(bad)}",
                expected="the same dtype and shape at every leaf",
                write="jax.tree.map(lambda new, old: new.astype(old.dtype), on_true, on_false)",
            )
        )
    return jax.tree.map(lambda a, b: a if is_float0(a) else jnp.where(pred, a, b), on_true, on_false)


def check_same_structure(a: Tree, b: Tree, name_a: str, name_b: str) -> None:
    """Raises a ValueError that lists the paths present in only one of two trees."""
    structures: tuple[Any, Any] = jax.tree.structure(a), jax.tree.structure(b)
    if structures[0] == structures[1]:
        return
    paths_a, paths_b = ({path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)} for tree in (a, b))
    rows = [f"only in {name_a}: {path or '<root>'}" for path in sorted(paths_a - paths_b)]
    rows += [f"only in {name_b}: {path or '<root>'}" for path in sorted(paths_b - paths_a)]
    rows = rows or [f"{name_a}: {structures[0]}", f"{name_b}: {structures[1]}"]
    raise ValueError(
        problem(
            f"{name_a} and {name_b} have different tree structures:\n{listing(rows)}",
            expected="one leaf for each leaf, in containers of the same types",
            write=f"{name_a} and {name_b} that come from the same tree",
        )
    )
