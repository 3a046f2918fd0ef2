"""Delayed scaling: scales from the largest numbers of the steps before, in a state that the caller threads through."""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from mpjax._dtypes import FLOAT32
from mpjax._errors import listing, problem
from mpjax._state import rebuild, register_state, register_with_flax
from mpjax.diagnostics._place import Place
from mpjax.diagnostics._taps import Found, Taps, tapped
from mpjax.diagnostics._traced import trace
from mpjax.fp8._markers import as_bits, differentiable_once, is_marker
from mpjax.fp8._places import site_key, site_names
from mpjax.fp8._scaling import amax, power_of_two_scale, quantize


@register_state("history")
@dataclasses.dataclass(frozen=True, eq=False)
class DelayedScaling:
    """The largest magnitudes of the last steps at each place that brings arrays into 8 bits: a pytree of one array.

    It is no parameter and has no gradient: the optimizer never sees it. Steps under `jit` take and return it as they do
    the optimizer's state, and checkpoints keep it.

    Attributes:
      names: the places, static: module path, which product in it (counted from 0), and `lhs`, `rhs` or `gradient`.
        Those in one module, or in none (`main`), are told apart by the lines of code that lead to them.
      margin: powers of two between the largest number and the end of the format, static.
      history: float32 of shape (places, steps), the last step first; 0 where there was none.
    """

    names: tuple[str, ...]
    margin: int
    history: Any

    def __post_init__(self) -> None:
        register_with_flax(type(self))

    def updated(self, amaxes: Any) -> Self:
        """The state after a step.

        Args:
          amaxes: float32 of shape (places,), the largest magnitude at each. Of a place where it is infinite or NaN the
            history stays as it is: one overflow is not to spoil the scales of a thousand steps.
        """
        new = jnp.concatenate([amaxes[:, None], self.history[:, :-1]], axis=1)
        return self._replace(history=jnp.where(jnp.isfinite(amaxes)[:, None], new, self.history))

    def _replace(self, **changes: Any) -> Self:
        new: Self = rebuild(type(self), **{**vars(self), **changes})
        return new


def init(fn: Callable[..., Any], *, steps: int = 1024, margin: int = 0) -> Callable[..., DelayedScaling]:
    """The state that `delayed` starts with.

    Args:
      fn: the function that `delayed` takes.
      steps: how many steps it looks back: TransformerEngine's 1024 by default.
      margin: powers of two to leave between the largest number of those steps and the end of the format.

    Returns:
      A function of `fn`'s arguments, which may be `jax.ShapeDtypeStruct`s, that returns a `DelayedScaling`.

    Raises:
      ValueError: `steps` is below 1, `margin` below 0; the function brings nothing into 8 bits with a scale for a whole
        tensor.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> rules = mp.default_rules().with_fp8(mp.fp8.Recipe(min_reuse=0, emulate=True))
    >>> fn = jax.grad(mp.autocast(lambda w, x: jnp.mean(x @ w), "mixed_float8", rules))
    >>> mp.fp8.init(fn, steps=4)(jnp.ones((16, 16)), jnp.ones((32, 16))).names
    ('main:0/lhs', 'main:0/rhs', 'main:0/gradient')
    """
    for name, value, least in (("steps", steps, 1), ("margin", margin, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                problem(
                    f"{name} is {value!r}.",
                    expected=f"a whole number from {least} up",
                    write="mp.fp8.init(fn, steps=1024, margin=0)(*args)",
                )
            )

    @functools.wraps(fn)
    def made(*args: Any, **kwargs: Any) -> DelayedScaling:
        leaves, structure = jax.tree.flatten((args, kwargs))
        moving = [hasattr(x, "dtype") and hasattr(x, "shape") for x in leaves]
        found: list[tuple[str, ...]] = []

        def run(arrays: Sequence[Any]) -> None:
            given = iter(arrays)
            merged = [next(given) if m else x for x, m in zip(leaves, moving, strict=True)]
            call_args, call_kwargs = jax.tree.unflatten(structure, merged)
            found.append(_names(trace(fn, call_args, call_kwargs).jaxpr))

        jax.eval_shape(run, [x for x, m in zip(leaves, moving, strict=True) if m])
        return DelayedScaling(found[-1], margin, jnp.zeros((len(found[-1]), steps), FLOAT32))

    return made


def delayed(fn: Callable[..., Any], *, axis_name: Any = None) -> Callable[..., tuple[Any, DelayedScaling]]:
    """Gives the fp8 products in a function scales from the steps before, in place of scales of the moment.

    With a scale that is known beforehand, an array is brought into 8 bits as it is made; a scale of the moment takes a
    pass over it first. Numbers past the range, larger than any of the steps before, saturate. Infinities and NaNs come
    through, so that a loss scale sees them, and stay out of the history. Where there is no history yet, as in the first
    step, scales are of the moment.

    The function is traced and evaluated again; each place in the code has one scale: what a layer used three times, the
    rows of a `vmap`, the iterations of a loop, microbatches and devices have in common is the largest of them. So have
    layers that one line of a Python loop calls, unless they have names: `jax.named_scope(f"block_{i}")`. Put the
    gradient inside: it has places of its own. Products with a scale for each channel are left as they are.

    A step that is skipped should not write: `fp8_state = mp.select_tree(finite, new_state, fp8_state)`, where `finite`
    is what `mp.all_finite(grads)` says.

    Args:
      fn: any function of pytrees with `mp.autocast(..., "mixed_float8")` or `mp.fp8.dot_general` in it, such as
        `mp.value_and_grad(loss_fn, loss_scale)`; for NNX modules a function of the state and the graph of `nnx.split`.
      axis_name: under `shard_map` around it, the axes whose devices share scales. Inside it they do by themselves.

    Returns:
      A function `(state, *args) -> (result, new_state)`; it takes `jit`, `vmap`, `scan`, `checkpoint`.

    Raises:
      TypeError: the first argument is no `DelayedScaling`.
      ValueError: the state is of other places than the function has.
      NotImplementedError: a gradient is taken of what it returns.

    >>> import jax, jax.numpy as jnp, mpjax as mp
    >>> rules = mp.default_rules().with_fp8(mp.fp8.Recipe(min_reuse=0, emulate=True))
    >>> grad_fn = jax.grad(mp.autocast(lambda w, x: jnp.mean(x @ w), "mixed_float8", rules))
    >>> w, x = jnp.ones((16, 16)), jnp.full((32, 16), 3.0)
    >>> state = mp.fp8.init(grad_fn, steps=4)(w, x)
    >>> step = jax.jit(mp.fp8.delayed(grad_fn))
    >>> grads, state = step(state, w, x)
    >>> dict(zip(state.names, state.history[:, 0].tolist()))
    {'main:0/lhs': 3.0, 'main:0/rhs': 1.0, 'main:0/gradient': 0.001953125}

    References:
      TransformerEngine's delayed scaling; Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433.
    """

    @functools.wraps(fn)
    def scaled(state: DelayedScaling, *args: Any, **kwargs: Any) -> tuple[Any, DelayedScaling]:
        if not isinstance(state, DelayedScaling):
            raise TypeError(
                problem(
                    f"the state is a {type(state).__name__}.",
                    expected="a DelayedScaling as the first argument",
                    write="mp.fp8.delayed(fn)(mp.fp8.init(fn)(*args), *args)",
                )
            )
        traced = trace(fn, args, kwargs)
        names, largest = site_names(traced.jaxpr), largest_seen(state, traced.jaxpr)

        def replace(eqn: Any, ins: list[Any], here: Place) -> tuple[list[Any], Found] | None:
            if not is_marker(eqn):
                return None
            name = names[site_key(eqn, here)]
            if name not in largest:  # with a scale for each channel
                return None
            return _at_site(eqn, ins[0], largest[name], name)

        taps = Taps(lambda eqn, path: False, enter_ruled=True, replace=replace)
        ins = jax.tree.map(differentiable_once, (traced.consts, traced.arrays))
        outs, found = tapped(taps, traced.jaxpr, *ins)
        # What is not evaluated again, as in the condition of a loop, keeps scales of the moment.
        amaxes = jnp.stack([found.get(name, jnp.zeros((), FLOAT32)) for name in state.names])
        if axis_name is not None:
            amaxes = jax.lax.pmax(amaxes, axis_name)
        return traced.result(outs), state.updated(amaxes)

    # By it `jax.jit` would count arguments, to keep some static: it has no state.
    del scaled.__wrapped__
    return scaled


def _at_site(eqn: Any, x: Any, largest: Any, name: str) -> tuple[list[Any], Found]:
    dtype, scales = eqn.params["dtype"], eqn.outvars[1].aval
    now = jnp.max(amax(x))
    scale = power_of_two_scale(jnp.where(largest > 0, largest, now), dtype)
    made = quantize(x, dtype, scale=jnp.reshape(scale, (1,) * x.ndim), saturate=True)
    return [as_bits(made.values), jnp.broadcast_to(scale, scales.shape)], OrderedDict([(name, now)])


def _names(jaxpr: Any) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(site_names(jaxpr, whole=True).values()))
    if not names:
        raise ValueError(
            problem(
                "the function brings nothing into 8 bits with one scale for a tensor.",
                expected='mp.autocast(fn, "mixed_float8") in it, and products that are large enough',
                write='mp.explain(fn, "mixed_float8")(*args), which says why a product is not in fp8',
            )
        )
    return names


def largest_seen(state: DelayedScaling, jaxpr: Any) -> dict[str, Any]:
    """The largest magnitude of the steps before at each place of a program, with the margin; 0 where there was none.

    Raises:
      ValueError: the state is of other places.
    """
    names = _names(jaxpr)
    if state.names != names:
        more, less = [n for n in names if n not in state.names], [n for n in state.names if n not in names]
        raise ValueError(
            problem(
                f"the state is of other places than the function has. It lacks\n{listing(more or ['nothing'])}\n"
                f"  and has beside them\n{listing(less or ['nothing'])}",
                expected="the state of the same function, saved or new",
                write="state = mp.fp8.init(fn)(*args), which starts with scales of the moment",
            )
        )
    return dict(zip(names, jnp.max(state.history, axis=1) * 2.0**state.margin, strict=True))
