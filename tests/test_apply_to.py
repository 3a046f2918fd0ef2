"""A policy set on the modules of an NNX model, by path, and the report of it."""

import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers import bits
from jaxprs import matrix_dtypes

import mpjax as mp

pytestmark = pytest.mark.standard_promotion

X = jax.random.normal(jax.random.key(0), (8, 4))
HALF = mp.get_policy("params=bfloat16,compute=float16,output=float32")


class Gate(nnx.Module):
    """Written by hand: parameters, and no dtype."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(4))
        self.parts = nnx.data({"shift": nnx.Param(jnp.zeros(4))})

    def __call__(self, x):
        return x * self.scale + self.parts["shift"]


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.gate = Gate()
        self.tied = self.first
        self.positions = nnx.Param(jnp.arange(4))
        self.seen = nnx.Variable(jnp.float32(0.0))

    def __call__(self, x):
        x = self.dropout(self.norm(self.tied(self.first(x))))
        for block in self.blocks:
            x = block(x)
        return self.gate(x)


def settings(report):
    return {(row.path, row.attribute): (row.before, row.after) for row in report.settings}


def dtypes(model, *kinds):
    flat = nnx.to_flat_state(nnx.state(model, *kinds))
    return {"/".join(map(str, path)): str(variable.get_value().dtype) for path, variable in flat}


def test_attributes_and_parameters():
    model = Net(nnx.Rngs(0))
    others = nnx.Not(nnx.Param)
    before, expected = bits(nnx.state(model, others)), np.asarray(model.first.kernel[...].astype(jnp.bfloat16))
    report = HALF.apply_to(model)
    for module in (model.first, model.norm, *model.blocks):
        assert (module.dtype, module.param_dtype) == (jnp.float16, jnp.bfloat16)
    parameters = dtypes(model, nnx.Param)
    assert parameters.pop("positions") == "int32"
    assert set(parameters.values()) == {"bfloat16"}
    np.testing.assert_array_equal(model.first.kernel[...], expected)
    assert bits(nnx.state(model, others)) == before
    assert len(settings(report)) == len(report.settings), "a shared module is set once"
    assert settings(report)["first", "dtype"] == ("None", "float16")
    assert settings(report)["blocks/1", "param_dtype"] == ("float32", "bfloat16")
    assert settings(report)["gate/parts/shift", "value"] == ("float32", "bfloat16")
    assert {path for path, attribute in settings(report) if attribute == "value"} == set(parameters)
    assert set(report.without_dtype) == {"gate", ""}
    graph, state = nnx.split(model)
    assert matrix_dtypes(lambda state, x: nnx.merge(graph, state)(x), state, X) == {"float16"}


def test_it_says_the_same_of_a_second_time():
    model = Net(nnx.Rngs(0))
    HALF.apply_to(model)
    state = bits(nnx.state(model))
    assert all(row.before == row.after for row in HALF.apply_to(model).settings)
    assert bits(nnx.state(model)) == state


def test_the_table():
    text = str(HALF.apply_to(Net(nnx.Rngs(0))))
    header, *rows = text.splitlines()
    assert header.split() == ["path", "module", "attribute", "before", "after"]
    assert ["norm", "BatchNorm", "dtype", "None", "float16"] in [row.split() for row in rows]
    assert rows[-2:] == [f"{path}: no dtype to set, computes as its code says" for path in ("gate", "<root>")]
    assert len({row.index("float32") for row in rows if " float32 " in row}) == 1  # a column
    assert str(HALF.apply_to(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))).splitlines()[1].startswith("<root> ")


@pytest.mark.parametrize("pattern", ["norm", ".*NORM", "norm(/.*)?", next(iter(mp.default_overrides()))])
def test_an_override_for_a_module(pattern):
    model = Net(nnx.Rngs(0))
    HALF.with_overrides({pattern: "float32"}).apply_to(model)
    assert (model.norm.dtype, model.norm.param_dtype) == (jnp.float32, jnp.float32)
    assert (model.first.dtype, model.first.param_dtype) == (jnp.float16, jnp.bfloat16)
    kept = {path for path, dtype in dtypes(model, nnx.Param).items() if dtype == "float32"}
    assert kept == {"norm/scale", "norm/bias"}


def test_an_override_for_parameters_and_for_one_attribute():
    model = Net(nnx.Rngs(0))
    HALF.with_overrides(
        {".*/bias": "float32", "blocks/0/dtype": "bfloat16", "norm": "float32", "norm/scale": "float16"}
    ).apply_to(model)
    assert model.first.param_dtype == jnp.bfloat16
    assert dtypes(model, nnx.Param)["first/bias"] == "float32"
    assert (model.blocks[0].dtype, model.blocks[0].param_dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert model.blocks[1].dtype == jnp.float16
    assert model.norm.param_dtype == jnp.float32
    assert dtypes(model, nnx.Param)["norm/scale"] == "float16"


def test_an_override_for_all_holds_for_the_root():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    HALF.with_overrides({".*": "float32"}).apply_to(model)
    assert (model.dtype, model.param_dtype, model.kernel[...].dtype) == (jnp.float32,) * 3


def test_fp8_computes_in_bfloat16():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    mp.get_policy("mixed_float8").apply_to(model)
    assert (model.dtype, model.kernel[...].dtype) == (jnp.bfloat16, jnp.float32)


def test_abstract_modules():
    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    report = HALF.apply_to(model)
    assert isinstance(model.first.kernel.get_value(), jax.ShapeDtypeStruct)
    assert settings(report)["first/kernel", "value"] == ("float32", "bfloat16")
    assert dtypes(model, nnx.BatchStat) == {"norm/mean": "float32", "norm/var": "float32"}


def test_inside_jit_the_module_outside_changes():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    nnx.jit(lambda model: HALF.apply_to(model) and None)(model)
    assert (model.dtype, model.kernel[...].dtype) == (jnp.float16, jnp.bfloat16)


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # of the whole tree cast
def test_batch_statistics_do_not_stall():
    """flax's N2: cast with the whole tree, a running mean of many small steps stops far from the true one."""
    x = jnp.full((4, 1), 100.0)

    def mean_after(model):
        step = jax.jit(lambda state: nnx.state((m := nnx.merge(graph, state), m(x))[0]))
        graph, state = nnx.split(model)
        for _ in range(600):
            state = step(state)
        return float(nnx.merge(graph, state).mean[...][0])

    model = nnx.BatchNorm(1, momentum=0.99, rngs=nnx.Rngs(0))
    mp.get_policy("bfloat16").apply_to(model)
    assert model(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    whole = nnx.BatchNorm(1, momentum=0.99, rngs=nnx.Rngs(0))
    nnx.update(whole, jax.tree.map(lambda v: v.astype(jnp.bfloat16), nnx.state(whole)))
    assert mean_after(model) == pytest.approx(100, rel=0.01)
    assert mean_after(whole) < 80


class Derived(nnx.Module):
    """Attributes that are no policy's to choose: an integer dtype, and one computed from something else."""

    dtype = jnp.int32

    def __init__(self):
        self.w = nnx.Param(jnp.ones(2))

    @property
    def param_dtype(self):
        return self.w[...].dtype


class ByClass(nnx.Module):
    """Attributes that the class has."""

    dtype = None
    param_dtype = jnp.float32

    def __init__(self):
        self.w = nnx.Param(jnp.ones(2))


def test_attributes_that_are_not_set():
    module = Derived()
    report = HALF.apply_to(module)
    assert [row.attribute for row in report.settings] == ["value"]
    assert report.without_dtype == ("",)
    assert (module.dtype, module.param_dtype) == (jnp.int32, jnp.bfloat16)


def test_attributes_of_the_class():
    module = ByClass()
    assert HALF.apply_to(module).without_dtype == ()
    assert (module.dtype, module.param_dtype) == (jnp.float16, jnp.bfloat16)
    assert ByClass.dtype is None


class Frozen(nnx.Module):
    """Refuses what it is told."""

    def __init__(self):
        self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.dtype = None

    def __setattr__(self, name, value):
        if name == "dtype" and value is not None:
            raise RuntimeError("frozen")
        super().__setattr__(name, value)


def described(model):
    graph, state = nnx.split(model)
    return graph, bits(state)


def test_all_or_nothing():
    """What a module refuses, an override that disagrees, a warning that is an error: nothing is set."""
    model = Frozen()
    before = described(model)
    with pytest.raises(RuntimeError, match="frozen"):
        HALF.apply_to(model)
    assert described(model) == before
    model = Net(nnx.Rngs(0))
    before = described(model)
    with pytest.raises(ValueError, match=r"2 overrides match 'norm' and disagree"):
        HALF.with_overrides({".*norm": "float32", "n.*": "float16"}).apply_to(model)
    assert described(model) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="overrides that match no path: 'nrom'"):
            HALF.with_overrides({"nrom": "float32"}).apply_to(model)
    assert described(model) == before


def test_an_override_that_matches_nothing_warns_at_the_callers_line():
    with pytest.warns(UserWarning, match=r"'nrom'(.|\n)*blocks/0(.|\n)*at least one module or parameter") as caught:
        HALF.with_overrides({"nrom": "float32", "norm": "float32"}).apply_to(Net(nnx.Rngs(0)))
    assert [w.filename for w in caught] == [__file__]


def test_an_override_for_a_module_without_a_dtype_warns():
    with pytest.warns(UserWarning, match="overrides that match no path: 'dropout'"):
        HALF.with_overrides({"dropout": "float32"}).apply_to(Net(nnx.Rngs(0)))


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"module is a Dense(.|\n)*Module\(dtype=policy.compute_dtype, param_dtype="):
        HALF.apply_to(nn.Dense(2))
    with pytest.raises(TypeError, match=r"module is a State\.(.|\n)*a Flax NNX module"):
        HALF.apply_to(nnx.state(Net(nnx.Rngs(0))))


def test_without_flax():
    """Who has no module needs no flax, and the error says what was expected."""
    code = "import sys, mpjax as mp\ntry: mp.get_policy('bfloat16').apply_to({})\nexcept TypeError as e: print(e)\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print('flax' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert "module is a dict." in done.stdout
    assert done.stdout.strip().endswith("False")
