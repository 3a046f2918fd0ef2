import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers import bits
from hypothesis import given
from hypothesis import strategies as st

import mpjax as mp
from mpjax import _tree

FLOAT0 = np.zeros((2,), jax.dtypes.float0)
UNTOUCHED = {
    "int": jnp.arange(3),
    "bool": jnp.array([True]),
    "key": jax.random.key(0),
    "legacy_key": jax.random.PRNGKey(0),
    "none": None,
    "float0": FLOAT0,
    "fp8": jnp.ones(2, jnp.float8_e4m3fn),
    "python_int": 3,
}


def paths(tree):
    return [_tree.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_paths_are_the_same_for_dicts_linen_nnx_and_tuples():
    class Net(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(1, 1, rngs=nnx.Rngs(0))])
            self.bn = nnx.BatchNorm(1, rngs=nnx.Rngs(0))

    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1, kernel_init=nn.with_partitioning(nn.initializers.ones, ("a", "b")))(x)

    assert "layers/0/kernel" in paths(nnx.state(Net()))
    assert "bn/mean" in paths(nnx.state(Net()))
    assert "params/Dense_0/kernel" in paths(Boxed().init(jax.random.key(0), jnp.ones((1, 1))))
    assert paths({"a": (jnp.ones(1), [jnp.ones(1)])}) == ["a/0", "a/1/0"]
    assert paths(jnp.ones(1)) == [""]
    # A parameter that is itself called value keeps its name.
    assert paths({"value": 1.0}) == ["value"]


def test_casts_leave_other_leaves_alone():
    cast = _tree.cast_floats(UNTOUCHED, jnp.dtype("float16"))
    for name, leaf in UNTOUCHED.items():
        assert cast[name] is leaf
    wide = _tree.widen(UNTOUCHED)
    for name, leaf in UNTOUCHED.items():
        assert wide[name] is leaf


def test_casts_return_the_same_object_when_there_is_nothing_to_cast():
    x = jnp.ones(3, jnp.float16)
    assert _tree.cast_floats({"x": x}, jnp.dtype("float16"))["x"] is x


def test_casts_of_numpy_scalars_and_shapes():
    cast = _tree.cast_floats(
        {"np": np.ones(2, np.float32), "scalar": np.float32(2), "aval": jax.ShapeDtypeStruct((3,), jnp.float32)},
        jnp.dtype("bfloat16"),
    )
    assert isinstance(cast["np"], np.ndarray)
    assert cast["np"].dtype == cast["scalar"].dtype == cast["aval"].dtype == jnp.bfloat16
    assert cast["aval"].shape == (3,)


def test_widen_keeps_float64_and_complex(x64):
    tree = {"f64": jnp.ones(1, jnp.float64), "c": jnp.ones(1, jnp.complex64), "h": jnp.ones(1, jnp.bfloat16)}
    assert [x.dtype.name for x in jax.tree.leaves(_tree.widen(tree))] == ["complex64", "float64", "float32"]


FINITE = {
    "empty": {},
    "max_f16": jnp.array([65504.0, -65504.0], jnp.float16),
    "max_bf16": jnp.array([jnp.finfo(jnp.bfloat16).max]),
    "bf16_beyond_f16": jnp.array([1e30], jnp.bfloat16),
    "max_f32": jnp.array([np.finfo(np.float32).max]),
    "python": [1.0, 2, 1 + 2j],
    "zero_size": jnp.zeros((0, 3)),
    **{name: {"x": leaf} for name, leaf in UNTOUCHED.items()},
}
NON_FINITE = {
    "inf": jnp.array([1.0, jnp.inf]),
    "minus_inf": jnp.array([-jnp.inf], jnp.float16),
    "nan": jnp.array([[jnp.nan, 0.0]], jnp.bfloat16),
    "complex": jnp.array([1 + 1j * jnp.nan]),
    "fp8_nan": jnp.array([jnp.nan]).astype(jnp.float8_e4m3fn),
    "python": [1.0, float("inf")],
    "deep": {"a": [jnp.ones(3), {"b": jnp.array(jnp.nan)}], "n": 1},
}


@pytest.mark.parametrize("name", FINITE)
def test_finite_trees(name):
    flag = mp.all_finite(FINITE[name])
    assert flag.shape == ()
    assert flag.dtype == jnp.bool_
    assert bool(flag)


@pytest.mark.parametrize("name", NON_FINITE)
def test_non_finite_trees(name):
    assert not bool(mp.all_finite(NON_FINITE[name]))
    if name != "python":
        assert not bool(jax.jit(mp.all_finite)(NON_FINITE[name]))


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_all_finite_is_numpys(values):
    array = np.array(values, np.float32)
    half = len(array) // 2
    assert bool(mp.all_finite([array[:half], array[half:]])) == bool(np.isfinite(array).all())


def test_select_tree_selects_every_kind_of_leaf():
    a = {"x": jnp.array([jnp.nan, 1.0]), "k": jax.random.key(1), "n": jnp.array(1), "z": FLOAT0, "none": None}
    b = {"x": jnp.array([-0.0, 2.0]), "k": jax.random.key(2), "n": jnp.array(2), "z": FLOAT0, "none": None}
    for select in (mp.select_tree, jax.jit(mp.select_tree)):
        assert bits(select(jnp.array(True), a, b)) == bits(a)
        assert bits(select(jnp.array(False), a, b)) == bits(b)


def test_select_tree_lists_every_leaf_that_differs():
    a = {"w": jnp.ones(2), "b": jnp.ones(2), "alike": jnp.ones(1)}
    b = {"w": jnp.ones(2, jnp.float16), "b": jnp.ones(3), "alike": jnp.ones(1)}
    with pytest.raises(TypeError) as error:
        mp.select_tree(jnp.array(True), a, b)
    message = str(error.value)
    assert "w: float32(2,) against float16(2,)" in message
    assert "b: float32(2,) against float32(3,)" in message
    assert "alike" not in message


@pytest.mark.parametrize("pred", [jnp.array([True]), jnp.array(1), 1.0])
def test_select_tree_wants_one_boolean(pred):
    with pytest.raises(TypeError, match="one boolean") as error:
        mp.select_tree(pred, 1.0, 2.0)
    assert "mp.all_finite(grads)" in str(error.value)


def test_different_structures_name_the_paths():
    with pytest.raises(ValueError, match="different tree structures") as error:
        mp.select_tree(jnp.array(True), {"a": 1.0, "b": {"c": 1.0}}, {"a": 1.0, "b": {"d": 1.0}})
    assert "only in on_true: b/c" in str(error.value)
    assert "only in on_false: b/d" in str(error.value)
    with pytest.raises(TypeError, match="w: str against str, not arrays"):
        mp.select_tree(jnp.array(True), {"w": "x"}, {"w": "y"})
    with pytest.raises(ValueError, match="PyTreeDef"):
        mp.select_tree(jnp.array(True), [1.0], (1.0,))


def test_long_listings_are_cut():
    a = {f"w{i}": jnp.ones(1) for i in range(20)}
    b = {f"w{i}": jnp.ones(2) for i in range(20)}
    with pytest.raises(TypeError, match="and 12 more"):
        mp.select_tree(jnp.array(True), a, b)
