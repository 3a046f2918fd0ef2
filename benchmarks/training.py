"""Whole training steps of the models of `models.py`, as users write them: what `model_costs.py` and `gpu_steps.py` run.

A step is loss, gradients and optimizer, with parameters, model state and optimizer state donated: AdamW behind clipping
by the global norm for the transformers, SGD with momentum for ResNet-50.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jmp
import models
import optax
from flax.training.dynamic_scale import DynamicScale

import mpjax as mp

try:
    import mpx
except ImportError:
    mpx = None

# Where `mixed_float8` has nothing to do, and why.
NO_FP8 = {"resnet50": "convolutions stay bfloat16, and 1000 classes are no multiple of 16"}
HALF = jmp.get_policy("params=float32,compute=float16,output=float32")


@dataclasses.dataclass(frozen=True)
class Training:
    """A step, and what it carries from one to the next.

    Attributes:
      case: the model.
      init: `init(params) -> extra`, which is the optimizer's state and all that the method keeps beside it.
      step: `step(params, state, extra, batch) -> (params, state, extra, loss)`.
    """

    case: models.Case
    init: Callable[..., Any]
    step: Callable[..., Any]

    @property
    def avals(self) -> Any:
        """The types of what `step` takes."""
        params, state, batch = self.case.avals
        return params, state, jax.eval_shape(self.init, params), batch

    def jitted(self) -> Any:
        return jax.jit(self.step, donate_argnums=(0, 1, 2))


def optimizer(model: str) -> optax.GradientTransformation:
    if model == "resnet50":
        return optax.sgd(0.1, momentum=0.9, nesterov=True)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))


def plain(dtype: Any, model: str, **options: Any) -> Training:
    """The model with a `dtype` in every module, or none, and optax."""
    case, tx = models.case(model, dtype, **options), optimizer(model)

    def step(params: Any, state: Any, opt_state: Any, batch: Any) -> Any:
        (loss, state), grads = jax.value_and_grad(case.loss, has_aux=True)(params, state, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, loss

    return Training(case, tx.init, step)


def autocast(policy: str, model: str, *, emulate: bool = False, **options: Any) -> Training:
    """The float32 model under `mp.autocast`; `emulate` is for 8-bit products where there are none."""
    case, chosen = models.case(model, None, **options), mp.get_policy(policy)
    rules = mp.default_rules().with_fp8(mp.fp8.Recipe(min_reuse=0, emulate=True)) if emulate else None
    loss_fn = mp.autocast(case.loss, chosen, rules)
    tx = mp.loss_scaled(optimizer(model), chosen.loss_scale())

    def step(params: Any, state: Any, opt_state: Any, batch: Any) -> Any:
        grad_fn = mp.value_and_grad(loss_fn, mp.get_loss_scale(opt_state), has_aux=True)
        (loss, state), grads = grad_fn(params, state, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, loss

    return Training(case, tx.init, step)


def flax_dynamic_scale(model: str, **options: Any) -> Training:
    """As in Flax's ImageNet and WMT examples: float16 in every module, and `where` over parameters and optimizer."""
    case, tx = models.case(model, jnp.float16, **options), optimizer(model)

    def step(params: Any, state: Any, extra: Any, batch: Any) -> Any:
        opt_state, scale = extra
        grad_fn = scale.value_and_grad(case.loss, has_aux=True)
        scale, finite, (loss, state), grads = grad_fn(params, state, batch)
        updates, new_opt_state = tx.update(grads, opt_state, params)
        keep = functools.partial(jnp.where, finite)
        new_params = jax.tree.map(keep, optax.apply_updates(params, updates), params)
        return new_params, state, (jax.tree.map(keep, new_opt_state, opt_state), scale), loss

    # Arrays from the beginning: its own Python numbers would be compiled for a second time after the first step.
    scale = DynamicScale(fin_steps=jnp.int32(0), scale=jnp.float32(65536.0))
    return Training(case, lambda params: (tx.init(params), scale), step)


def jmp_style(model: str, **options: Any) -> Training:
    """As in jmp's README and Haiku's ImageNet example: cast parameters and inputs, unscale, select."""
    case, tx = models.case(model, None, **options), optimizer(model)

    def step(params: Any, state: Any, extra: Any, batch: Any) -> Any:
        opt_state, *leaves = extra
        loss_scale = jmp.DynamicLossScale(*leaves)

        def scaled(params: Any) -> Any:
            loss, new_state = case.loss(HALF.cast_to_compute(params), state, HALF.cast_to_compute(batch))
            return loss_scale.scale(loss), (loss, new_state)

        grads, (loss, new_state) = jax.grad(scaled, has_aux=True)(params)
        grads = loss_scale.unscale(grads)
        finite = jmp.all_finite(grads)
        updates, new_opt_state = tx.update(grads, opt_state, params)
        new = (optax.apply_updates(params, updates), new_opt_state)
        params, opt_state = jmp.select_tree(finite, new, (params, opt_state))
        loss_scale = loss_scale.adjust(finite)
        return params, new_state, (opt_state, loss_scale.loss_scale, loss_scale.counter), loss

    # The scale's two arrays and not the object, which validates what jax.jit rebuilds it with.
    scale, counter = jnp.float32(2.0**15), jnp.int32(0)
    return Training(case, lambda params: (tx.init(params), scale, counter), step)


def mpx_style(model: str, **options: Any) -> Training:
    """As in mpx's README: `mpx.filter_value_and_grad` and `mpx.optimizer_update`."""
    case, tx = models.case(model, None, **options), optimizer(model)

    def step(params: Any, state: Any, extra: Any, batch: Any) -> Any:
        opt_state, scaling = extra
        grad_fn = mpx.filter_value_and_grad(case.loss, scaling=scaling, has_aux=True)
        (loss, new_state), scaling, finite, grads = grad_fn(params, state, batch)
        params, opt_state = mpx.optimizer_update(params, tx, opt_state, grads, finite)
        # It casts every argument: statistics come back in float16 and would be compiled for a second time.
        state = jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)
        return params, state, (opt_state, scaling), loss

    def init(params: Any) -> Any:
        one, highest = jnp.ones((), jnp.float32), jnp.float32(mpx.FLOAT16_MAX)
        return tx.init(params), mpx.DynamicLossScaling(loss_scaling=highest, min_loss_scaling=one, period=2000)

    return Training(case, init, step)
