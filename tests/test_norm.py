import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax as mp


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_global_norm_is_computed_in_float32(dtype):
    """optax.tree.norm: float16 of 4 x 300 is inf, 1000 bfloat16 ones are 16 (O5)."""
    assert float(mp.transforms.global_norm({"w": jnp.full(4, 300.0, dtype)})) == 600.0
    ones = {"a": [jnp.ones((), dtype)] * 1000}
    assert float(mp.transforms.global_norm(ones)) == pytest.approx(np.sqrt(1000.0))
    assert mp.transforms.global_norm(ones).dtype == jnp.float32


def test_global_norm_of_any_tree():
    tree = {"w": jnp.array([3.0]), "c": jnp.array([4j]), "n": jnp.array(100), "k": jax.random.key(0), "none": None}
    assert float(mp.transforms.global_norm(tree)) == 5.0
    assert float(mp.transforms.global_norm({})) == 0.0


def test_on_float32_it_is_optaxs_own_expression():
    """Identical jaxprs, so XLA merges the finite check with the norm of clip_by_global_norm."""
    tree = {"a": jnp.ones((3, 2)), "b": jnp.ones(4)}
    assert str(jax.make_jaxpr(mp.transforms.global_norm)(tree)) == str(jax.make_jaxpr(optax.tree.norm)(tree))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("value", "expected"), [(300.0, 0.5), (0.125, 0.125)])
def test_clip_by_global_norm(dtype, value, expected):
    """optax zeroes a float16 tree of 300s, since its norm is inf (O5b)."""
    clip = mp.transforms.clip_by_global_norm(1.0)
    tree = {"w": jnp.full(4, value, dtype), "n": None}
    out, _ = jax.jit(lambda t: clip.update(t, clip.init(t)))(tree)
    assert str(out["w"].dtype) == dtype
    assert out["w"].tolist() == [expected] * 4


def test_fp8_leaves_count_in_float32():
    tree = {"w": jnp.full(2, 100.0, jnp.float8_e4m3fn)}
    norm = mp.transforms.global_norm(tree)
    assert norm.dtype == jnp.float32
    assert float(norm) == pytest.approx(float(tree["w"][0]) * np.sqrt(2), rel=1e-6)


def test_clip_leaves_other_leaves_alone():
    clip = mp.transforms.clip_by_global_norm(1.0)
    tree = {"w": jnp.array([3.0, 4.0]), "n": jnp.array(7), "z": np.zeros(2, jax.dtypes.float0), "f": 0.0}
    out, _ = clip.update(tree, clip.init(tree))
    np.testing.assert_allclose(out["w"], [0.6, 0.8], rtol=1e-6)
    assert out["n"] is tree["n"]
    assert out["z"] is tree["z"]


def test_clip_is_optaxs_on_float32():
    tree = {"w": jnp.linspace(-3.0, 3.0, 7)}
    ours, theirs = mp.transforms.clip_by_global_norm(0.7), optax.clip_by_global_norm(0.7)
    np.testing.assert_array_equal(ours.update(tree, None)[0]["w"], theirs.update(tree, None)[0]["w"])


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_clip_wants_a_positive_norm(max_norm):
    with pytest.raises(ValueError, match="a number above 0"):
        mp.transforms.clip_by_global_norm(max_norm)


def test_clip_composes_in_a_chain():
    tx = optax.chain(mp.transforms.clip_by_global_norm(1.0), optax.scale(2.0))
    updates, _ = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init({"w": jnp.zeros(2)}))
    np.testing.assert_allclose(updates["w"], [1.2, 1.6], rtol=1e-6)
