"""The skip contract for every optimizer of optax that takes a learning rate alone."""

import inspect
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import bits

import mpjax as mp

pytestmark = [
    pytest.mark.standard_promotion,
    pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated"),
    pytest.mark.filterwarnings("ignore:Specifying a key will be required"),
]

# Need more than gradients (a value or a line search's function), as their docs say.
NEEDS_MORE = {"lbfgs"}


def takes_a_learning_rate_alone(name):
    fn = getattr(optax, name)
    if name.startswith(("_", "scale_by")) or not inspect.isfunction(fn):
        return False
    parameters = inspect.signature(fn).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return "learning_rate" in [p.name for p in parameters] and required in ([], ["learning_rate"])


OPTIMIZERS = [n for n in dir(optax) if takes_a_learning_rate_alone(n) and n not in NEEDS_MORE]
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.array([0.5, -0.0, 0.25])}


def test_the_list_is_optaxs():
    assert len(OPTIMIZERS) >= 27
    assert {"adam", "adamw", "adafactor", "lion", "sgd", "lamb", "noisy_sgd", "rprop", "sm3"} <= set(OPTIMIZERS)


@pytest.mark.parametrize("params_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_is_bit_identical(name, params_dtype):
    """Random places of inf, -inf and NaN; then the run goes on as if the step had never been."""
    rng = np.random.default_rng(zlib.crc32(f"{name} {params_dtype}".encode()))
    tx = mp.loss_scaled(getattr(optax, name)(learning_rate=1e-2), mp.StaticLossScale(64.0))
    params = jax.tree.map(lambda p: p.astype(params_dtype), PARAMS)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def random_grads(bad):
        grads = {k: rng.normal(size=p.shape).astype(np.float32) for k, p in params.items()}
        if bad is not None:
            leaf = grads[rng.choice(sorted(grads))]
            leaf.ravel()[rng.integers(leaf.size)] = bad
        return {k: jnp.asarray(64.0 * g, params_dtype) for k, g in grads.items()}

    state = tx.init(params)
    for _ in range(2):
        params, state = step(params, state, random_grads(None))
    for count, bad in enumerate((np.inf, -np.inf, np.nan), 1):
        new_params, new_state = step(params, state, random_grads(bad))
        assert bits(new_params) == bits(params)
        assert bits(new_state.skip_state.inner_state) == bits(state.skip_state.inner_state)
        assert int(new_state.skip_state.skips_total) == count
        params, state = new_params, new_state
    moved, after = step(params, state, random_grads(None))
    assert bits(moved) != bits(params)
    assert bool(mp.all_finite((moved, after)))
    dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
    assert dtypes(after) == dtypes(tx.init(params))
