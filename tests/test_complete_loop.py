"""examples/complete_loop.py: it runs, and its loop is the same mathematics written down again in float64."""

import importlib.util
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax as mp

# optax's bias correction and schedules rely on JAX's usual promotion.
pytestmark = pytest.mark.standard_promotion

PATH = Path(__file__).parent.parent / "examples" / "complete_loop.py"
STEPS, BATCH, MICROBATCHES, BAD_STEP = 30, 32, 4, 11


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("complete_loop", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def true_gradients(params, images, labels):
    """The example's network and its loss, and their gradients, by hand."""
    layers = params["params"]
    kept, x = [], images
    for i in (0, 1):
        dense, norm = layers[f"Dense_{i}"], layers[f"LayerNorm_{i}"]
        z = x @ dense["kernel"] + dense["bias"]
        spread = 1 / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
        unit = (z - z.mean(-1, keepdims=True)) * spread
        y = unit * norm["scale"] + norm["bias"]
        inside = np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))
        kept.append((x, unit, spread, y, inside))
        x = 0.5 * y * (1 + inside)
    logits = x @ layers["Dense_2"]["kernel"] + layers["Dense_2"]["bias"]
    logits = logits - logits.max(-1, keepdims=True)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    loss = -np.mean(np.log(shares[np.arange(len(labels)), labels]))

    back = (shares - np.eye(10)[labels]) / len(labels)
    grads = {"Dense_2": {"kernel": x.T @ back, "bias": back.sum(0)}}
    back = back @ layers["Dense_2"]["kernel"].T
    for i in (1, 0):
        x, unit, spread, y, inside = kept[i]
        slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * y**2) * (1 - inside**2)
        back = back * (0.5 * (1 + inside) + 0.5 * y * slope)
        grads[f"LayerNorm_{i}"] = {"scale": (back * unit).sum(0), "bias": back.sum(0)}
        back = back * layers[f"LayerNorm_{i}"]["scale"]
        back = spread * (back - back.mean(-1, keepdims=True) - unit * (back * unit).mean(-1, keepdims=True))
        grads[f"Dense_{i}"] = {"kernel": x.T @ back, "bias": back.sum(0)}
        back = back @ layers[f"Dense_{i}"]["kernel"].T
    return loss, {"params": grads}


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def true_run(params, batches, mode):
    """The whole run in NumPy: clipping to 1, AdamW under warm-up and cosine, an average at 0.98, a skipped step.

    Microbatch m has the rows r with r % 4 == m. With "drop" those with an inf are left out.
    """
    leaves, structure = jax.tree.flatten(params)
    ends = np.cumsum([x.size for x in leaves])[:-1]
    w = flat(params)
    mean = square = average = np.zeros_like(w)
    taken, losses = 0, []
    for batch in batches:
        image, label = np.asarray(batch["image"], np.float64), batch["label"]
        bad = {r % MICROBATCHES for r in np.flatnonzero(~np.isfinite(image).all(-1))}
        kept = np.array([r % MICROBATCHES not in bad for r in range(len(label))])
        if bad and mode == "skip":
            losses.append(np.nan)
            continue
        pieces = [part.reshape(x.shape) for part, x in zip(np.split(w, ends), leaves, strict=True)]
        loss, grads = true_gradients(jax.tree.unflatten(structure, pieces), image[kept], label[kept])
        losses.append(loss)
        g = flat(grads)
        g = g / max(np.linalg.norm(g), 1.0)
        warm_up = STEPS // 10
        decayed = 0.5 + 0.5 * np.cos(np.pi * (taken - warm_up) / (STEPS - warm_up))
        rate = 3e-3 * (taken / warm_up if taken < warm_up else decayed)
        taken += 1
        mean = 0.9 * mean + 0.1 * g
        square = 0.999 * square + 0.001 * g**2
        adam = mean / (1 - 0.9**taken) / (np.sqrt(square / (1 - 0.999**taken)) + 1e-8)
        w = w - rate * (adam + 1e-2 * w)
        average = 0.98 * average + 0.02 * w
    return w, average / (1 - 0.98**taken), losses, taken


def batches_of(example):
    train, _ = example.load()
    batches = list(example.batches(train, BATCH, STEPS, seed=3))
    # One pixel of row 6: microbatch 2.
    batches[BAD_STEP]["image"][6, 20] = np.inf
    return batches


def our_run(example, batches, mode, policy="float32", dtype="float32"):
    """The example's own optimizer and step, with a dynamic loss scale whatever the policy."""
    scaled = types.SimpleNamespace(loss_scale=lambda: mp.DynamicLossScale(2.0**10, period=8))
    tx = example.make_optimizer(scaled, STEPS)
    loss_fn = mp.autocast(example.loss_fn, policy)
    step = example.make_train_step(loss_fn, tx, MICROBATCHES) if mode == "skip" else dropping_step(loss_fn, tx)
    params = example.Classifier().init(jax.random.key(0), jnp.zeros((1, 64)))
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    first, state = jax.tree.map(np.asarray, params), tx.init(params)
    losses, scales = [], []
    for batch in batches:
        scales.append(float(np.log2(mp.get_loss_scale(state).loss_scale)))
        batch = {"image": batch["image"].astype(dtype), "label": batch["label"]}
        params, state, metrics = step(params, state, batch)
        losses.append(float(metrics["loss"]))
    return first, params, state, losses, scales


def dropping_step(loss_fn, tx):
    @jax.jit
    def step(params, state, batch):
        grad_fn = mp.value_and_grad(loss_fn, mp.get_loss_scale(state), has_aux=True)
        (loss, _), grads, dropped = mp.accumulate(grad_fn, MICROBATCHES, on_overflow="drop")(params, batch)
        updates, state = tx.update(grads, state, params, overflowed=dropped.any())
        return optax.apply_updates(params, updates), state, {"loss": loss}

    return step


def distance(got, true, first):
    """The norm of the difference, and the largest one; as shares of how far the true run has moved."""
    error, moved = flat(got) - true, true - flat(first)
    return np.linalg.norm(error) / np.linalg.norm(moved), np.abs(error).max() / np.abs(moved).max()


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("skip", "float32"), pytest.param("skip", "float64", marks=pytest.mark.slow), ("drop", "float64")],
)
def test_the_loop_is_right(example, mode, dtype):
    """With an inf in one microbatch of step 11. What float64 has left comes from optax's schedule, in float32."""
    with jax.enable_x64(dtype == "float64"):
        batches = batches_of(example)
        first, params, state, losses, scales = our_run(example, batches, mode, dtype=dtype)
        average = mp.transforms.ema_params(state)
    expected, expected_average, expected_losses, taken = true_run(first, batches, mode)
    assert {str(x.dtype) for x in jax.tree.leaves((params, average))} == {dtype}
    in_norm, at_most = (5e-5, 1e-3) if dtype == "float32" else (2e-7, 1e-5)
    for got, true in ((params, expected), (average, expected_average)):
        norm, largest = distance(got, true, first)
        assert norm < in_norm
        assert largest < at_most
    np.testing.assert_allclose(losses, expected_losses, rtol=in_norm)
    assert losses[-1] < 0.6 * losses[0]

    inner = state.skip_state.inner_state
    assert taken == STEPS - (mode == "skip")
    assert int(state.skip_state.skips_total) == STEPS - taken
    assert int(inner.steps) == int(inner.inner_state[1][0].count) == taken
    # The scale backs off after step 11 in both modes.
    assert scales == [10] * 8 + [11] * 4 + [10] * 8 + [11] * 8 + [12] * 2


@pytest.mark.parametrize(("policy", "tolerance"), [("mixed_float16", 0.002), ("mixed_bfloat16", 0.015)])
def test_low_precision_lands_close(example, policy, tolerance):
    """Losses and averaged weights of the same run, against float64."""
    batches = batches_of(example)
    first, _, state, losses, _ = our_run(example, batches, "skip", policy)
    _, expected, expected_losses, _ = true_run(first, batches, "skip")
    np.testing.assert_allclose(losses, expected_losses, rtol=tolerance)
    assert distance(mp.transforms.ema_params(state), expected, first)[0] < 10 * tolerance


def test_the_example_runs(example, capsys):
    accuracy = example.main(["--policy", "bfloat16", "--steps", "40", "--batch", "64", "--microbatches", "4"])
    printed = capsys.readouterr().out
    assert str(mp.get_policy("bfloat16")) in printed
    assert "40 steps of 64 images in 4 microbatches" in printed
    assert "0 skipped" in printed
    assert f"{accuracy:.3f} with their average" in printed
    assert accuracy > 0.9


def test_by_default_it_asks_the_hardware(example, capsys):
    example.main(["--steps", "2", "--batch", "8", "--microbatches", "2"])
    assert str(mp.default_policy()) in capsys.readouterr().out
