"""The comparison table of the README, cell by cell, on the releases of the peers that are installed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import jmp
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.dynamic_scale import DynamicScale

import mpjax as mp

pytestmark = pytest.mark.standard_promotion

README = (Path(__file__).parent.parent / "README.md").read_text()


def row(label):
    """The cells of a row: mpjax, jmp, flax, optax."""
    found = re.search(rf"^\| {re.escape(label)} \|(.*)\|$", README, re.MULTILINE)
    assert found, label
    return [cell.strip() for cell in found.group(1).split("|")]


def test_floor_after_jit():
    through = jax.jit(lambda s: s)
    ours = through(mp.DynamicLossScale(2.0**10, min_loss_scale=2.0**5)).min_loss_scale
    theirs = through(jmp.DynamicLossScale(jnp.float32(2.0**10), min_loss_scale=jnp.float32(2.0**5))).min_loss_scale
    flaxs = through(DynamicScale(minimum_scale=2.0**5)).minimum_scale
    assert (ours, float(theirs), flaxs) == (32.0, 1.0, 32.0)
    assert row("floor of the scale after `jit`") == ["kept", "reset to 1", "kept", "no scale"]


def test_traces():
    grads = {"w": jnp.ones(2)}
    tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale())
    skipper = optax.apply_if_finite(optax.sgd(0.1), 5)
    steps = {
        "mpjax": (lambda s: tx.update(grads, s)[1], tx.init(grads)),
        "jmp": (lambda s: s.adjust(jnp.array(True)), jmp.DynamicLossScale(jnp.asarray(2.0**15))),
        "flax": (lambda s: s.value_and_grad(lambda w: w.sum())(grads["w"])[0], DynamicScale()),
        "optax": (lambda s: skipper.update(grads, s)[1], skipper.init(grads)),
    }
    counts = []
    for step, state in steps.values():
        traces = []
        jitted = jax.jit(lambda s, step=step, traces=traces: (traces.append(1), step(s))[1])
        for _ in range(3):
            state = jitted(state)
        counts.append(str(len(traces)))
    assert counts == row("traces of a step, documented constructor")


def test_float16_gradient_unscaled():
    tiny = jnp.asarray(2.0**-14, jnp.float16)
    ours = mp.DynamicLossScale(jnp.asarray(2.0**15)).unscale(tiny)
    theirs = jmp.DynamicLossScale(jnp.asarray(2.0**15)).unscale(tiny)
    *_, flaxs = DynamicScale(scale=2.0**15).value_and_grad(lambda w: w * 2.0**-29)(jnp.float32(1.0))
    assert (float(ours), float(theirs), float(flaxs)) == (2.0**-29, 0.0, 2.0**-29)
    assert row("float16 gradient 2^-14 unscaled by 2^15") == ["2^-29", "0", "2^-29", "no scale"]


def test_orbax(tmp_path):
    states = {
        "mpjax": mp.DynamicLossScale(),
        "jmp": jmp.DynamicLossScale(jnp.float32(2.0**15)),
        "flax": jax.tree.map(jnp.asarray, DynamicScale()),
        "optax": optax.apply_if_finite(optax.sgd(0.1), 5).init(jnp.ones(1)),
    }
    cells = []
    for name, state in states.items():
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / name, state)
                checkpointer.wait_until_finished()
                checkpointer.restore(tmp_path / name, state)
            cells.append("yes")
        except AttributeError:
            cells.append("raises")
    assert cells == row("saved and restored by Orbax")


def test_ten_nan_steps():
    def after(tx):
        params = {"w": jnp.ones(2)}
        state = tx.init(params)
        for _ in range(10):
            updates, state = tx.update({"w": jnp.array([jnp.nan, 1.0])}, state, params)
            params = optax.apply_updates(params, updates)
        return params["w"]

    assert after(mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale())).tolist() == [1.0, 1.0]
    assert jnp.isnan(after(optax.apply_if_finite(optax.sgd(0.1), 5)))[0]
    assert row("parameters after 10 NaN steps in a row")[0::3] == ["unchanged", "NaN, when told to allow 5"]


def test_bfloat16_parameters_with_float32_gradients():
    params, grads = {"w": jnp.ones(2, jnp.bfloat16)}, {"w": jnp.ones(2)}
    tx = mp.loss_scaled(optax.adam(0.1), mp.DynamicLossScale())
    tx.update(grads, tx.init(params), params)
    theirs = optax.apply_if_finite(optax.adam(0.1), 5)
    with pytest.raises(TypeError, match=r"true_fun|branch"):
        theirs.update(grads, theirs.init(params), params)
    assert row("bfloat16 parameters, float32 gradients")[0::3] == ["work", "raises"]


def test_bytes_are_those_of_the_results_page():
    results = (Path(__file__).parent.parent / "benchmarks" / "RESULTS.md").read_text()
    with_clipping = results[results.index("with clipping") : results.index("without clipping")]

    def ratio(name):
        found = re.search(rf"^\| {re.escape(name)} \|[^|]*\((\d\.\d+)x\)", with_clipping, re.MULTILINE)
        return f"{float(found.group(1)):.2f}x"

    names = ("mp.loss_scaled, DynamicLossScale", "jmp: all_finite and select_tree", "optax.apply_if_finite")
    ours, jmps, optaxs = map(ratio, names)
    assert row("bytes of a clipped AdamW step, TPU v5e") == [ours, jmps, "not measured", optaxs]
