"""Stochastic rounding of weights in half precision or fp8: no masters, and no step is lost on average."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from mpjax._dtypes import FLOAT32
from mpjax._errors import problem
from mpjax._typing import Scalar, Tree
from mpjax.transforms._half_weights import check_given, check_weights, keep_low, updates_to
from mpjax.transforms._rounding import stochastic
from mpjax.transforms._skip_on_overflow import as_transform, check_state
from mpjax.transforms._stored import StoredTransform, as_seen_by, to_float32


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`.

    Attributes:
      inner_state: the wrapped transform's, made for parameters in float32.
      key: uint32, the data of the PRNG key. It never changes.
      step: int32, the steps taken, which gives each its own random bits.
    """

    inner_state: Any
    key: jax.Array
    step: Scalar


def stochastic_rounding(
    inner: optax.GradientTransformation,
    key: jax.Array,
    *,
    axis_name: str | Sequence[str] | Tree = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that parameters in half precision or fp8 are rounded up or down at random, without bias.

    A parameter plus its step, in float32, becomes one of its two neighbours in the parameter's dtype, the nearer the
    likelier, so that the expected result is the sum itself and steps of any size count. No memory is needed for it.
    inf and NaN stay, and no finite sum becomes inf.

    The random bits are those of the key, the number of the step and the place of the parameter in the tree: a run can
    be repeated, and no two steps, parameters or numbers share theirs. A skipped step of `mpjax.skip_on_overflow` does
    not count.

    Args:
      inner: any optax transform. Parameters, gradients and so its state are float32 to it.
      key: a typed key, `jax.random.key(0)`, of any implementation.
      axis_name: under `shard_map`, where each device sees its own shard, the mesh axes over which the parameters are
        sharded: one or several names where that is true of all, else their `in_specs`, a tree of `PartitionSpec`
        with the structure of the parameters or a prefix of it. Shards then round with their own bits, and replicas
        alike. Under `jit` nothing is needed.

    Returns:
      A transform with a `StochasticRoundingState`, for `mpjax.loss_scaled` and `mpjax.skip_on_overflow` directly
      around it, or for use without them. Updates of these parameters are float32. Parameters in float32 are updated
      as by `inner` alone.

    Raises:
      TypeError: `inner` is not an optax transform, `key` no typed key; on update, the state is another transform's.
      ValueError: no parameter is in half precision or fp8; on update, there are no params.

    >>> import jax, jax.numpy as jnp, mpjax as mp, optax
    >>> tx = mp.loss_scaled(mp.transforms.stochastic_rounding(optax.sgd(1.0), jax.random.key(0)), mp.NoOpLossScale())
    >>> params = {"w": jnp.ones(10_000, jnp.bfloat16)}
    >>> updates, state = tx.update({"w": jnp.full(10_000, -1e-4, jnp.bfloat16)}, tx.init(params), params)
    >>> params = mp.transforms.apply_updates(params, updates)
    >>> float(params["w"].astype(jnp.float32).mean())
    1.0001...

    References:
      Gupta et al., Deep Learning with Limited Numerical Precision, arXiv 1502.02551; Zamirai et al., Revisiting
      BFloat16 Training, arXiv 2010.06192.
    """
    inner = as_transform(inner)
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()):
        raise TypeError(
            problem(
                f"key is {key!r}.",
                expected="one typed PRNG key",
                write="mp.transforms.stochastic_rounding(inner, jax.random.key(0))",
            )
        )
    implementation = jax.random.key_impl(key)

    def init(params: Tree) -> StochasticRoundingState:
        check_weights(params, "stochastic_rounding")
        # As numbers, since flax cannot serialize typed keys; a copy, since the state may be donated.
        data = jnp.copy(jax.random.key_data(key))
        return StochasticRoundingState(inner.init(as_seen_by(inner, params)), data, jnp.zeros([], jnp.int32))

    def update(
        updates: Tree, state: StochasticRoundingState, params: Tree = None, **extra_args: Any
    ) -> tuple[Tree, StochasticRoundingState]:
        check_state(state, StochasticRoundingState)
        check_given(params, "stochastic_rounding")
        check_weights(params, "stochastic_rounding")
        steps, inner_state = inner.update(
            to_float32(updates), state.inner_state, as_seen_by(inner, params), **extra_args
        )
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=implementation), state.step)

        def rounded(param: Any, step: jax.Array, index: int, axes: tuple[str, ...]) -> jax.Array:
            leaf_key = jax.random.fold_in(step_key, index)
            for axis in axes:
                leaf_key = jax.random.fold_in(leaf_key, jax.lax.axis_index(axis))
            return stochastic(jnp.asarray(param).astype(FLOAT32) + step.astype(FLOAT32), param.dtype, leaf_key)

        leaves, structure = jax.tree.flatten(params)
        indices = jax.tree.unflatten(structure, range(len(leaves)))
        weights = keep_low(rounded, params, steps, indices, sharded_axes(axis_name, params))
        state = StochasticRoundingState(inner_state, state.key, optax.safe_increment(state.step))
        return updates_to(params, weights, steps), state

    return StoredTransform(init, update)


def sharded_axes(axis_name: Any, params: Tree) -> Tree:
    """For each parameter the names of the axes over which it is sharded."""
    if isinstance(axis_name, str):
        axis_name = (axis_name,)
    if isinstance(axis_name, Sequence) and all(isinstance(name, str) for name in axis_name):
        axis_name = PartitionSpec(*axis_name)

    def of_each(spec: PartitionSpec | None, part: Tree) -> Tree:
        entries = ((entry,) if isinstance(entry, str) else entry or () for entry in spec or ())
        names = tuple(name for entry in entries for name in entry)
        return jax.tree.map(lambda _: names, part)

    # None is the spec of what is replicated, and of a parameter that is None.
    return jax.tree.map(of_each, axis_name, params, is_leaf=lambda x: x is None or isinstance(x, PartitionSpec))
