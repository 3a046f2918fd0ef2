"""The exponential moving average of the parameters, which does not stall."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpjax._compat import is_tracer
from mpjax._dtypes import BFLOAT16, wide_dtype
from mpjax._errors import listing, problem
from mpjax._tree import check_same_structure, instances, is_inexact_leaf, path_name
from mpjax._typing import Scalar, Tree
from mpjax.transforms._skip_on_overflow import SkipOnOverflowState, as_transform, check_state
from mpjax.transforms._stored import SelectingTransform, apply_updates, as_seen_by, keep_state, to_float32, update_inner


class ParamsEmaState(NamedTuple):
    """State of `params_ema`.

    Attributes:
      inner_state: the wrapped transform's.
      average: the average of each parameter in float32 (float64 and complex kept); nothing for leaves without a
        gradient. Before the first step, the parameters.
      remainder: what the last addition rounded off each average, in bfloat16 (for complex ones in their dtype).
      steps: int32, steps averaged.
      log_decay: float32, the logarithm of the product of all decays so far.
    """

    inner_state: Any
    average: Tree
    remainder: Tree
    steps: Scalar
    log_decay: Scalar


def params_ema(
    inner: optax.GradientTransformation, decay: float | Callable[[Any], Any], debias: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that its state holds an exponential moving average of the parameters.

    After each step `average += weight * (params - average)` with the new parameters as they are stored. The weight is
    `1 - decay`, debiased by `1 - decay**steps`: the average of the parameters after each step so far, not of the
    initial ones. `ema_params(opt_state)` reads it.

    Put it directly inside `mpjax.loss_scaled` or `mpjax.skip_on_overflow`, whose skipped steps it then does not see,
    and around everything that changes the updates. Around `mpjax.transforms.master_weights` it averages the weights in
    half precision that the masters round to, inside it the masters. Inside `optax.MultiSteps` it counts whole windows;
    there, and in `optax.chain`, it sees parameters in half precision before they are rounded to be stored.

    A float32 average stalls too: within 6e-8 / (1 - decay) of a parameter at rest, 6e-4 of its value for 0.9999, a step
    rounds to nothing. The 16 bits that an addition rounds off are therefore kept and added in the next one, which makes
    the state 6 bytes a parameter.

    Args:
      inner: any optax transform; extra arguments are forwarded to it.
      decay: from 0 up to, not including, 1; or a schedule, a function from the count of earlier steps to a decay.
      debias: False starts at the initial parameters instead, which keep the weight `decay**steps`.

    Returns:
      A transform with a `ParamsEmaState`, whose updates are those of `inner`.

    Raises:
      TypeError: `inner` is not an optax transform; on update, the state is another transform's.
      ValueError: `decay` is out of range; on init, `inner` skips steps, which would be averaged all the same; on
        update, there are no params.

    >>> import jax.numpy as jnp, mpjax as mp, optax
    >>> tx = mp.loss_scaled(mp.transforms.params_ema(optax.sgd(1.0), 0.5), mp.NoOpLossScale())
    >>> params = {"w": jnp.zeros(1)}
    >>> state = tx.init(params)
    >>> for gradient in (-3.0, -3.0, jnp.nan):
    ...     updates, state = tx.update({"w": jnp.full(1, gradient)}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["w"], mp.transforms.ema_params(state)["w"]
    (Array([6.], dtype=float32), Array([5.], dtype=float32))

    References:
      Debiasing: Kingma and Ba, Adam, arXiv 1412.6980, section 3. The remainder: Kahan, Further remarks on reducing
      truncation errors, 1965.
    """
    if not callable(decay) and not is_tracer(decay) and not 0 <= decay < 1:
        raise ValueError(
            problem(
                f"decay is {decay}.",
                expected="a number from 0 up to, not including, 1, or a schedule of such",
                write="mp.transforms.params_ema(inner, 0.999)",
            )
        )
    inner = as_transform(inner)

    def init(params: Tree) -> ParamsEmaState:
        inner_state = inner.init(as_seen_by(inner, params))
        _check_skips_nothing(inner_state)
        # A copy: a donated state must not hold the parameters' own buffers.
        average = _masked(lambda p: jnp.array(p, _average_dtype(p), copy=True), params)
        remainder = _masked(lambda p: jnp.zeros(jnp.shape(p), _remainder_dtype(p)), params)
        return ParamsEmaState(inner_state, average, remainder, jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def update(
        updates: Tree, state: ParamsEmaState, params: Tree = None, *, taken: Any = None, **extra_args: Any
    ) -> tuple[Tree, ParamsEmaState]:
        check_state(state, ParamsEmaState)
        _check_given(params)
        updates, inner_state = update_inner(
            inner, taken, to_float32(updates), state.inner_state, as_seen_by(inner, params), extra_args
        )
        steps = optax.safe_increment(state.steps)
        # 1 - decay in the precision of decay: a float32 near 1 has lost the digits that count.
        rate = jnp.asarray(1 - (decay(state.steps) if callable(decay) else decay), jnp.float32).clip(0, 1)
        log_decay = jnp.log1p(-rate)
        # A sum over steps would lose digits: only a schedule needs one.
        log_decay = state.log_decay + log_decay if callable(decay) else log_decay * steps.astype(jnp.float32)
        total = -jnp.expm1(log_decay)
        weight = jnp.where(total > rate, rate / total, 1.0) if debias else rate

        def add(param: Any, average: jax.Array, remainder: jax.Array) -> tuple[jax.Array, jax.Array]:
            step = weight.astype(average.dtype) * (jnp.asarray(param).astype(average.dtype) - average)
            step += remainder.astype(average.dtype)
            new = average + step
            new = new if taken is None else jnp.where(taken, new, average)
            left = (step - (new - average)).astype(remainder.dtype)
            return new, left if taken is None else jnp.where(taken, left, remainder)

        sums = _masked(add, apply_updates(params, updates), state.average, state.remainder)
        average, remainder = (_masked(lambda p, new, i=i: new[i], params, sums) for i in range(2))
        counts = (steps, log_decay)
        if taken is not None:
            counts = keep_state(taken, counts, (state.steps, state.log_decay))
        return updates, ParamsEmaState(inner_state, average, remainder, *counts)

    return SelectingTransform(init, update)


def ema_params(opt_state: Any, params: Tree = None) -> Tree:
    """Finds the average of the parameters in an optimizer state, however deep in chains and wrappers it is.

    Args:
      opt_state: the state of a transform that holds one `params_ema`.
      params: any parameters of the same structure: the averages are cast to their dtypes, and leaves without one
        (integers, PRNG keys, functions) taken from them.

    Returns:
      The averages: as they are, in float32, or with `params` a tree like them, to use in their place.

    Raises:
      ValueError: the state has no average, or more than one (their paths are listed), or `params` differ from it in
        structure.

    >>> import jax.numpy as jnp, mpjax as mp, optax
    >>> tx = mp.loss_scaled(mp.transforms.params_ema(optax.sgd(0.1), 0.999), mp.DynamicLossScale())
    >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
    >>> mp.transforms.ema_params(tx.init(params)), mp.transforms.ema_params(tx.init(params), params)
    ({'w': Array([1., 1.], dtype=float32)}, {'w': Array([1, 1], dtype=bfloat16)})
    """
    found = list(_averages(opt_state, ()))
    if len(found) != 1:
        rows = [path_name(path) or "<root>" for path, _ in found]
        raise ValueError(
            problem(
                f"the optimizer state has {len(found)} averages of the parameters{':' if rows else '.'}\n"
                f"{listing(rows)}".rstrip(),
                expected="exactly one mp.transforms.params_ema",
                write="tx = mp.loss_scaled(mp.transforms.params_ema(optax.adamw(3e-4), 0.999), loss_scale)",
            )
        )
    average = found[0][1].average
    if params is None:
        return average
    # By path and not by structure: nnx.Optimizer keeps its state in other boxes than the parameters'.
    means, weights = (
        {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree) if is_inexact_leaf(x)}
        for tree in (average, params)
    )
    check_same_structure(weights, means, "params", "the average")
    return jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.asarray(means[path_name(path)], jnp.result_type(p)) if is_inexact_leaf(p) else p, params
    )


def _averages(state: Any, prefix: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], ParamsEmaState]]:
    """Every `ParamsEmaState` in a state, with its path; those inside another's inner state too."""
    for path, found in instances(state, ParamsEmaState):
        yield (*prefix, *path), found
        yield from _averages(found.inner_state, (*prefix, *path, jax.tree_util.GetAttrKey("inner_state")))


def _is_none(x: Any) -> bool:
    return x is None


def _masked(fn: Callable[..., Any], params: Tree, *rest: Tree) -> Tree:
    """Maps over leaves that have a gradient, with `optax.MaskedNode()`, which has no leaf, for all others."""
    return jax.tree.map(
        lambda p, *others: fn(p, *others) if is_inexact_leaf(p) else optax.MaskedNode(), params, *rest, is_leaf=_is_none
    )


def _average_dtype(param: Any) -> np.dtype[Any]:
    return wide_dtype(jnp.result_type(param))


def _remainder_dtype(param: Any) -> np.dtype[Any]:
    return _average_dtype(param) if jnp.iscomplexobj(param) else BFLOAT16


def _check_given(params: Tree) -> None:
    if params is None:
        raise ValueError(
            problem(
                "mp.transforms.params_ema was updated without the parameters.",
                expected="the parameters, to average what they become",
                write="tx.update(grads, opt_state, params)",
            )
        )


def _check_skips_nothing(inner_state: Any) -> None:
    if instances(inner_state, SkipOnOverflowState):
        raise ValueError(
            problem(
                "params_ema is around a transform that skips steps: it would average the parameters of those again.",
                expected="mp.loss_scaled or mp.skip_on_overflow outermost",
                write="mp.loss_scaled(mp.transforms.params_ema(inner, 0.999), loss_scale)",
            )
        )
