"""A whole training run on eight devices, however it is cut over them, is the run on one."""

import functools

import jax
import lm_run
import numpy as np
import pytest
from helpers import bits, run

# optax's bias correction relies on JAX's usual promotion.
pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("quick_compiles")]

QUICK = {*(("mixed_float16", layout) for layout in lm_run.LAYOUTS[:-1]), ("mixed_bfloat16", "data")}
CASES = [
    pytest.param(policy, layout, marks=() if (policy, layout) in QUICK else pytest.mark.slow)
    for policy in lm_run.HISTORY
    for layout in lm_run.LAYOUTS
]


def record(one, follow=None):
    """The states before and after each step, and the losses. With `follow`, each step starts from one of those."""
    states, losses = [one.start()], []
    for i, batch in enumerate(lm_run.batches()):
        state, loss = one.advance(one.place(follow[i], one.shardings) if follow else states[-1], batch)
        states.append(state)
        losses.append(loss)
    return states, np.array(losses)


@functools.cache
def alone(policy):
    """The run on one device, in NumPy."""
    states, losses = record(lm_run.Run(policy))
    return jax.device_get(states), losses


def close(got, true, share):
    """Within a share of the largest value of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(true), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=share * np.abs(b).max())


@pytest.mark.parametrize(("policy", "layout"), CASES)
def test_the_run_of_one_device(policy, layout):
    expected, expected_losses = alone(policy)
    scales, _ = run(lm_run.loss_scale(), lm_run.HISTORY[policy])
    skips = np.cumsum([step == "X" for step in lm_run.HISTORY[policy]])
    history = [(128.0, 0), *zip(2.0 ** np.array(scales), skips, strict=True)]
    assert [lm_run.scale_and_skips(state) for state in expected] == history
    assert expected_losses[-1] < 0.4 * expected_losses[0]
    rounding = lm_run.ROUNDING[policy]

    one = lm_run.Run(policy, layout)
    states, losses = record(one)
    assert [lm_run.scale_and_skips(state) for state in states] == history
    np.testing.assert_allclose(losses, expected_losses, rtol=max(4 * rounding, 2e-6))
    assert_places(states[-1], layout)

    # From the same state, so that differences do not add up. Where rows alone are cut, losses are the same to float32's
    # accuracy but for activations on the edge of rounding; a gradient adds up rounded ones.
    states, losses = record(one, expected)
    cuts_sums = layout == "tensor"
    np.testing.assert_allclose(losses, expected_losses, rtol=max(rounding, 1e-5) if cuts_sums else 5e-5)
    for before, after, true, step in zip(expected[:-1], states[1:], expected[1:], lm_run.HISTORY[policy], strict=True):
        close(after, true, max(16 * rounding, 1e-4))
        if step == "X":
            assert bits(after[0]) == bits(before[0])
            assert bits(after[1].skip_state.inner_state) == bits(before[1].skip_state.inner_state)
    assert one.step._cache_size() == 1


def assert_places(state, layout):
    """In shards where the layout says so; and what is on several devices is the same there, bit for bit."""
    sizes = {"fsdp": 8, "tensor": 4}
    qkv = state[0]["layers"][0]["qkv"]
    assert qkv.size == qkv.addressable_shards[0].data.size * sizes.get(layout, 1)
    assert {len(different) for different in lm_run.digests(state).values()} == {1}
