import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest
from helpers import LOSS_SCALES

import mpjax as mp

SCALE = mp.StaticLossScale(1024.0)


def loss_fn(params, x, power=2):
    return jnp.sum((params["w"] * x) ** power) + params["b"]


PARAMS = {"w": jnp.array([1.0, 2.0]), "b": jnp.float32(0.5)}


@pytest.mark.parametrize("name", LOSS_SCALES)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"])
def test_it_is_jaxs_value_and_grad_times_the_scale(name, wrap, leak_checks):
    state = LOSS_SCALES[name]
    value, grads = jax.value_and_grad(loss_fn)(PARAMS, 3.0)
    loss, scaled = wrap(lambda p, s: mp.value_and_grad(loss_fn, s)(p, 3.0))(PARAMS, state)
    assert loss == value
    assert loss.dtype == jnp.float32
    for got, true in zip(jax.tree.leaves(scaled), jax.tree.leaves(grads), strict=True):
        assert np.array_equal(got, true * float(state.loss_scale))
    back = state.unscale(scaled)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(grads), strict=True))
    assert jax.tree.structure(scaled) == jax.tree.structure(PARAMS)


def test_under_vmap_and_scan(leak_checks):
    fn = mp.value_and_grad(loss_fn, SCALE)
    xs = jnp.array([1.0, 2.0, 3.0])
    losses, grads = jax.vmap(fn, in_axes=(None, 0))(PARAMS, xs)
    _, scanned = jax.lax.scan(lambda c, x: (c, fn(c, x)), PARAMS, xs)
    assert np.array_equal(losses, scanned[0])
    for i in range(3):
        assert np.array_equal(grads["w"][i], fn(PARAMS, xs[i])[1]["w"])
        assert np.array_equal(scanned[1]["w"][i], grads["w"][i])


def test_grad_of_grad(leak_checks):
    """Double backward: unscale the inner gradients, scale the outer loss (scenario 7)."""

    def penalty(w):
        inner = SCALE.unscale(mp.grad(lambda w: jnp.sum(w**3), SCALE)(w))
        return jnp.sum(inner**2)

    w = jnp.array([1.0, 2.0])
    loss, grads = mp.value_and_grad(penalty, SCALE)(w)
    assert loss == 9.0 + 144.0
    assert np.array_equal(SCALE.unscale(grads), 36 * w**3)


def test_keywords_argnums_and_aux():
    def fn(a, b, *, k, extra):
        return (a * b * k).sum(), {"aux": a * 7, "extra": extra}

    a, b = jnp.array([2.0]), jnp.array([3.0])
    (loss, aux), grads = mp.value_and_grad(fn, SCALE, argnums=1, has_aux=True)(a, b, k=5.0, extra="kept")
    assert loss == 30.0
    assert grads.tolist() == [10.0 * 1024]
    assert aux["aux"].tolist() == [14.0]
    assert aux["extra"] == "kept"
    _, grads = mp.value_and_grad(fn, SCALE, argnums=(1, 0), has_aux=True)(a, b, k=5.0, extra=None)
    assert [g.item() for g in grads] == [10.0 * 1024, 15.0 * 1024]
    assert mp.grad(fn, SCALE, argnums=(0,), has_aux=True)(a, b, k=1.0, extra=None)[0][0].item() == 3072.0
    assert mp.grad(lambda a, b: (a * b).sum(), SCALE, argnums=-1)(a, b).item() == 2048.0


def test_aux_is_untouched():
    """Never look at aux: a perplexity of inf is no overflow (jaxamp A3), and nothing in it is scaled."""
    aux = {"perplexity": jnp.float32(jnp.inf), "half": jnp.float16(2.0), "n": jnp.array(3)}
    (_, out), grads = mp.value_and_grad(lambda w: (w, aux), SCALE, has_aux=True)(jnp.float32(1.0))
    assert out["half"].dtype == jnp.float16
    assert np.isinf(out["perplexity"])
    assert bool(mp.all_finite(grads))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_loss_is_true_and_float32(dtype, x64):
    """The scaled loss overflows, the reported one does not (mpx M3b reports inf)."""
    state = mp.DynamicLossScale(2.0**127)
    loss, _ = mp.value_and_grad(lambda w: w * 3, state)(jnp.asarray(20000.0, dtype))
    assert loss == (60000.0 if dtype != "bfloat16" else float(jnp.bfloat16(20000.0) * 3))
    assert str(loss.dtype) == ("float64" if dtype == "float64" else "float32")


def test_float16_gradients_that_underflow_are_kept_by_scaling():
    def loss(w):
        return (w.astype(jnp.float16) * jnp.float16(2.0**-14)).astype(jnp.float32).sum() * 2.0**-14

    w = jnp.ones(3)
    assert np.array_equal(mp.grad(loss, mp.NoOpLossScale())(w), np.zeros(3))
    assert np.array_equal(SCALE.unscale(mp.grad(loss, SCALE)(w)), np.full(3, 2.0**-28))


def test_any_tree():
    """Integers, keys and None among the parameters: flax's DynamicScale raises on them (F8)."""
    params = {"w": jnp.ones(2), "step": jnp.array(3), "rng": jax.random.key(0), "none": None, "list": [1.0, 2]}
    assert mp.grad(lambda p: p["f"](p["w"]).sum(), SCALE)({"w": jnp.ones(2), "f": jnp.tanh})["f"] is None
    assert mp.grad(lambda w, b: w.sum(), SCALE, argnums=np.int64(0))(jnp.ones(2), 1).shape == (2,)

    def loss(p):
        noise = jax.random.normal(p["rng"], (2,))
        return jnp.sum(p["w"] * p["step"].astype(jnp.float32)) + p["list"][0] + 0 * noise.sum()

    for fn in (mp.grad(loss, SCALE), jax.jit(mp.grad(loss, SCALE))):
        grads = fn(params)
        assert jax.tree.structure(grads) == jax.tree.structure(params)
        assert grads["w"].tolist() == [3072.0, 3072.0]
        assert grads["step"].dtype == jax.dtypes.float0
        assert grads["rng"].dtype == jax.dtypes.float0
        assert grads["list"][0] == 1024.0
        assert bool(mp.all_finite(grads))


def test_complex_parameters_with_a_real_loss():
    grads = mp.grad(lambda z: jnp.abs(z) ** 2, SCALE)(jnp.complex64(3 + 4j))
    np.testing.assert_allclose(SCALE.unscale(grads), jax.grad(lambda z: jnp.abs(z) ** 2)(jnp.complex64(3 + 4j)))


def test_gradients_have_their_parameters_dtypes(x64):
    params = {d: jnp.ones(2, d) for d in ("float16", "bfloat16", "float32", "float64")}
    loss = lambda p: sum(x.astype(jnp.float64).sum() for x in p.values())
    assert {k: str(v.dtype) for k, v in mp.grad(loss, SCALE)(params).items()} == {k: k for k in params}


@pytest.mark.parametrize(
    "state", [jmp.NoOpLossScale(), jmp.StaticLossScale(8.0), jmp.DynamicLossScale(jnp.float32(8.0))]
)
def test_jmps_loss_scales_work(state):
    loss, grads = mp.value_and_grad(lambda w: w**2, state)(jnp.float32(3.0))
    assert loss == 9.0
    assert grads == 6.0 * float(state.loss_scale)


def test_name_and_docstring_are_kept():
    assert mp.value_and_grad(loss_fn, SCALE).__name__ == "loss_fn"
    assert mp.grad(loss_fn, SCALE).__wrapped__ is loss_fn


W = jnp.ones(2)
BAD = {
    "non-scalar": (lambda: mp.value_and_grad(lambda w: w * 2, SCALE)(W), ValueError, "shape (2,)", "loss.mean()"),
    "complex": (
        lambda: mp.value_and_grad(lambda w: jax.lax.complex(w, w).sum(), SCALE)(W),
        TypeError,
        "dtype complex64",
        "jnp.abs(loss) ** 2",
    ),
    "holomorphic": (
        lambda: mp.grad(lambda z: z**2, SCALE)(jnp.complex64(1j)),
        TypeError,
        "holomorphic gradients cannot be scaled",
        "jnp.abs(loss) ** 2",
    ),
    "integer": (
        lambda: mp.value_and_grad(lambda w: (w > 0).sum(), SCALE)(W),
        TypeError,
        "dtype int32",
        "loss.astype(jnp.float32)",
    ),
    "tuple without has_aux": (
        lambda: mp.value_and_grad(lambda w: (w.sum(), w), SCALE)(W),
        TypeError,
        "returned a tuple",
        "has_aux=True",
    ),
    "nothing": (lambda: mp.value_and_grad(lambda w: None, SCALE)(W), TypeError, "returned a NoneType", "has_aux=True"),
    "has_aux without a pair": (
        lambda: mp.value_and_grad(lambda w: w.sum(), SCALE, has_aux=True)(W),
        TypeError,
        "has_aux=True, but the function returned",
        "return loss, {",
    ),
    "argnums too large": (
        lambda: mp.value_and_grad(lambda w: w.sum(), SCALE, argnums=1)(W),
        ValueError,
        "argnums is 1, but the function was called with 1",
        "grad_fn(params, batch)",
    ),
    "keyword only": (
        lambda: mp.value_and_grad(lambda w: w.sum(), SCALE)(w=W),
        ValueError,
        "called with 0 positional arguments",
        "without its keyword",
    ),
    "argnums twice": (
        lambda: mp.value_and_grad(lambda a, b: a.sum(), SCALE, argnums=(0, -2))(W, W),
        ValueError,
        "argnums is (0, -2)",
        "argnums=(0, 1)",
    ),
    "argnums is no position": (
        lambda: mp.value_and_grad(lambda w: w.sum(), SCALE, argnums="w")(W),
        ValueError,
        "argnums is 'w'",
        "grad_fn(params, batch)",
    ),
    "a string": (lambda: mp.grad(lambda w: "x", SCALE)(W), TypeError, "returned a str", "has_aux=True"),
    "no floats": (
        lambda: mp.grad(lambda w: 1.0, SCALE)({"a": jnp.arange(2)}),
        TypeError,
        "a: int32",
        "argnums=1",
    ),
    "no leaves": (lambda: mp.grad(lambda w: 1.0, SCALE)({}), TypeError, "(no leaves at all)", "argnums=1"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("under_jit", [False, True])
def test_bad_losses(name, under_jit):
    call, error, what, write = BAD[name]
    with pytest.raises(error) as caught:
        jax.jit(call)() if under_jit else call()
    for words in (what, "expected:", "write:", write):
        assert words in str(caught.value)


def test_a_clean_run_is_plain_optax():
    """A whole step in one jitted function, scale state and all, matches plain optax on a clean run."""
    tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale(2.0**10))
    plain = optax.sgd(0.1)

    @jax.jit
    def step(params, opt_state):
        loss, grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(opt_state))(params, 0.1)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params, opt_state = PARAMS, tx.init(PARAMS)
    reference, plain_state = PARAMS, plain.init(PARAMS)
    for _ in range(5):
        params, opt_state, loss = step(params, opt_state)
        value, grads = jax.value_and_grad(loss_fn)(reference, 0.1)
        updates, plain_state = plain.update(grads, plain_state)
        reference = optax.apply_updates(reference, updates)
        np.testing.assert_allclose(loss, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, reference)
