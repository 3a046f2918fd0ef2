"""Optimizer moments stored in half precision or 8 bits, and computed in float32."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpjax._dtypes import BFLOAT16, FLOAT32
from mpjax._errors import problem
from mpjax._typing import Scalar, Tree
from mpjax.transforms._blockwise import BlockScaled, encode, encode_like, saves
from mpjax.transforms._rounding import nearest, stochastic
from mpjax.transforms._skip_on_overflow import as_transform, check_state
from mpjax.transforms._state_rules import Match, check_all_used, checked_rules, matches
from mpjax.transforms._stochastic_rounding import sharded_axes
from mpjax.transforms._stored import StoredTransform, as_seen_by, to_float32


class StateDtypesState(NamedTuple):
    """State of `state_dtypes`.

    Attributes:
      inner_state: the wrapped transform's, with the chosen leaves in the dtypes that they are stored in.
      scales: float32, by path the scales of those in float16 and 8 bits: `BlockScaled(leaf, scales[path]).decode()`.
      key: uint32, the data of the PRNG key. It never changes.
      step: int32, the steps taken, which gives each its own random bits.
    """

    inner_state: Any
    # Not beside the values, since nnx.Optimizer keeps one array for each leaf of the wrapped transform's state.
    scales: dict[str, jax.Array]
    key: jax.Array
    step: Scalar


def state_dtypes(
    inner: optax.GradientTransformation,
    dtypes: Mapping[str, Any],
    *,
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    key: jax.Array | None = None,
    axis_name: str | Sequence[str] | Tree = None,
    block_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that its moments are stored in few bits, and still computed in float32.

    Before each update the stored moments are widened, and after it they are rounded. bfloat16 is 2 bytes beside each
    weight in place of 4. float16 and the 8-bit dtypes cannot hold a second moment as it is: a gradient of 1e-4 makes
    one of 1e-11, which is 0 in float16, and the step is divided by its root. They are stored as a `BlockScaled`, with a
    float32 scale for each row of the last axis or each block of one: 1 byte and little more. A block without a negative
    value, as those of second moments are, holds square roots, and nothing but 0 becomes 0.

    With normal gradients and b2 = 0.999 the root of a second moment is off by 2% (standard deviation) in bfloat16, by
    0.7% in float16, 15% in float8_e4m3fn and 21% in float8_e5m2, and in none on average by more than 2%.

    Only leaves that belong to a parameter are stored so, by their path. Counts, hyperparameters (all that is under
    `hyperparams` in `optax.inject_hyperparams`), masters, whatever has shape (), and arrays that scales would make
    larger keep their dtypes.

    Args:
      inner: any optax transform. Parameters, gradients and the state that it sees are float32 to it.
      dtypes: maps patterns to dtypes, such as `{"mu": "float8_e4m3fn", "nu": "bfloat16"}`. A pattern is a regular
        expression that must match the whole path of a leaf in the state (`"0/mu/dense/kernel"`) or one part of it
        (`"mu"`, `"(mu|nu)"`, `".*norm.*"`), ignoring case.
      rounding: `"stochastic"` keeps the expected value. `"nearest"` is for first moments alone: with b2 = 0.999, what
        a second moment loses in a step is less than half the spacing of bfloat16, and so it never decays.
      key: a typed key for stochastic rounding. Default: `jax.random.key(0)`. The random bits are those of the key, the
        step and the place of the moment in the state; a skipped step of `mpjax.skip_on_overflow` does not count.
      axis_name: under `shard_map`, the axes over which parameters are sharded, or their `in_specs`: as in
        `mpjax.transforms.stochastic_rounding`. Under `jit` nothing is needed.
      block_size: `None` for one scale a row, or a power of two. Where the last axis is sharded, one that divides a
        shard's needs no communication, and `tx.init` may be called outside of `shard_map`. On a TPU blocks take longer
        than rows: three times the estimated cycles of an 8-bit AdamW step, compiled for a v5e.

    Returns:
      A transform with a `StateDtypesState`. Directly around `optax.adamw(...)` or a chain, and inside all else:
      `mp.loss_scaled(mp.transforms.master_weights(mp.transforms.state_dtypes(optax.adamw(3e-4), {...})), loss_scale)`.
      Around a transform for half-precision parameters it is one itself.

    Raises:
      TypeError: `inner` is not an optax transform, `dtypes` no mapping, a dtype not floating, or `key` no typed key;
        on update, the state is another transform's.
      ValueError: `dtypes` has no regular expression or unknown dtype, `rounding` is unknown or `block_size` no power
        of two; on init, a pattern matches no moment, or two that match one disagree.

    >>> import jax.numpy as jnp, mpjax as mp, optax
    >>> tx = mp.transforms.state_dtypes(optax.adamw(1e-3), {"mu": "float8_e4m3fn", "nu": "bfloat16"})
    >>> state = tx.init({"w": jnp.ones((8, 300))})
    >>> state.inner_state[0].nu["w"].dtype, state.inner_state[0].mu["w"].dtype, state.scales["0/mu/w"].shape
    (dtype(bfloat16), dtype(float8_e4m3fn), (8, 1))

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861, for blocks. optax's `mu_dtype`
      has no counterpart for second moments (optax 0.2.8).
    """
    inner = as_transform(inner)
    rules = checked_rules(dtypes)
    _check_options(rounding, key, block_size)
    given = jax.random.key(0) if key is None else key
    implementation = jax.random.key_impl(given)

    def init(params: Tree) -> StateDtypesState:
        inner_state = inner.init(as_seen_by(inner, params))
        leaves, structure = jax.tree.flatten(inner_state)
        found = matches(inner_state, params, rules)
        check_all_used(found, rules)

        scales = {}

        def stored(x: Any, match: Match) -> Any:
            if match.dtype is None or match.dtype.itemsize >= x.dtype.itemsize:
                return _like(x, x)
            if match.dtype == BFLOAT16:
                return nearest(x.astype(FLOAT32), BFLOAT16, saturate=True)
            if not saves(x, match.dtype, block_size):
                return _like(x, x)
            values, scales[match.name] = encode(x.astype(FLOAT32), match.dtype, block_size, None)
            return values

        kept = [stored(x, match) for x, match in zip(leaves, found, strict=True)]
        # A copy of the key as numbers: flax cannot serialize typed keys, and the state may be donated.
        data = jnp.copy(jax.random.key_data(given))
        return StateDtypesState(jax.tree.unflatten(structure, kept), scales, data, jnp.zeros([], jnp.int32))

    def update(
        updates: Tree, state: StateDtypesState, params: Tree = None, **extra_args: Any
    ) -> tuple[Tree, StateDtypesState]:
        check_state(state, StateDtypesState)
        structure: Any  # it has methods, which mypy does not know of
        of_params: Any
        leaves, structure = jax.tree.flatten(state.inner_state)
        found = matches(state.inner_state, updates, rules)
        wide = [_widened(x, match, state.scales) for x, match in zip(leaves, found, strict=True)]
        weights = None if params is None else as_seen_by(inner, params)
        steps, new = inner.update(to_float32(updates), jax.tree.unflatten(structure, wide), weights, **extra_args)

        own_key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=implementation), _DOMAIN)
        leaf_keys = jax.random.split(jax.random.fold_in(own_key, state.step), len(leaves))
        paths, of_params = jax.tree_util.tree_flatten_with_path(updates)
        axes = of_params.flatten_up_to(sharded_axes(axis_name, updates))
        axes_of = {path: names for (path, _), names in zip(paths, axes, strict=True)}

        scales = dict(state.scales)

        def stored(index: int, new: Any, old: Any, match: Match) -> Any:
            new, leaf_key = new.astype(FLOAT32), None
            if rounding == "stochastic":
                leaf_key = leaf_keys[index]
                for axis in axes_of[match.owner]:
                    leaf_key = jax.random.fold_in(leaf_key, jax.lax.axis_index(axis))
            if match.name in scales:
                values, scales[match.name] = encode_like(new, BlockScaled(old, scales[match.name]), leaf_key)
                return values
            return nearest(new, BFLOAT16, saturate=True) if leaf_key is None else stochastic(new, BFLOAT16, leaf_key)

        rows = zip(structure.flatten_up_to(new), leaves, wide, found, strict=True)
        kept = [
            _like(x, old) if seen is old else stored(index, x, old, match)
            for index, (x, old, seen, match) in enumerate(rows)
        ]
        step = optax.safe_increment(state.step)
        return steps, StateDtypesState(jax.tree.unflatten(structure, kept), scales, state.key, step)

    is_stored = isinstance(inner, StoredTransform)
    return (StoredTransform if is_stored else optax.GradientTransformationExtraArgs)(init, update)


# Weights that `stochastic_rounding` rounds with the same key get other bits than their moments.
_DOMAIN = 0x6D6F6D


def _widened(x: Any, match: Match, scales: Mapping[str, jax.Array]) -> Any:
    """A stored leaf in float32; one that is not stored in the dtype of its rule is returned as it is."""
    if match.name in scales:
        return BlockScaled(x, scales[match.name]).decode()
    return x.astype(FLOAT32) if match.dtype == BFLOAT16 == x.dtype else x


def _like(new: Any, old: Any) -> Any:
    """`new` in the dtype of `old`, and never weakly typed: one trace, ever."""
    dtype = jnp.result_type(old)
    return new if jnp.issubdtype(dtype, jax.dtypes.extended) else jnp.asarray(new, dtype)


def _check_options(rounding: Any, key: Any, block_size: Any) -> None:
    if rounding not in ("stochastic", "nearest"):
        raise ValueError(
            problem(
                f"rounding is {rounding!r}.",
                expected='"stochastic", or "nearest" for first moments alone',
                write='mp.transforms.state_dtypes(inner, {"mu": "bfloat16"}, rounding="nearest")',
            )
        )
    if key is not None and not (
        hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    ):
        raise TypeError(
            problem(
                f"key is {key!r}.",
                expected="one typed PRNG key",
                write='mp.transforms.state_dtypes(inner, {"mu": "bfloat16"}, key=jax.random.key(0))',
            )
        )
    if block_size is not None and (not isinstance(block_size, int) or block_size < 1 or block_size & (block_size - 1)):
        raise ValueError(
            problem(
                f"block_size is {block_size!r}.", expected="a power of two, or None for rows", write="block_size=256"
            )
        )
