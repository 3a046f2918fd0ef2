"""`Policy.apply_to`: dtypes of NNX modules by path, and the report of what was set."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from helpers import bits

import mpjax as mp

POLICY = mp.get_policy("params=bfloat16,compute=float16,output=float32")


class Scaled(nnx.Module):
    """A module with a parameter of its own, and no dtype."""

    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(4))
        self.steps = nnx.Param(jnp.array(3))
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.linear(x) * self.scale


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(8, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([Scaled(rngs), Scaled(rngs)])
        self.again = self.layers[0]
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, tokens):
        x = self.dropout(self.norm(self.embed(tokens)))
        for layer in (*self.layers, self.again):
            x = layer(x)
        return self.head(x)


def test_what_is_set():
    model = Net(nnx.Rngs(0))
    kernel = model.head.kernel[...]
    others = bits(nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param))))
    report = POLICY.apply_to(model)
    for module in (model.embed, model.norm, model.head, model.layers[1].linear):
        assert (module.dtype, module.param_dtype) == (jnp.float16, jnp.bfloat16)
    floats = {str(x.dtype) for x in jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.Param)))}
    assert floats == {"bfloat16", "int32"}
    assert bits(model.head.kernel[...]) == bits(kernel.astype(jnp.bfloat16))
    assert bits(nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))) == others
    rows = {(row.path, row.attribute): row for row in report.settings}
    assert rows["head", "dtype"] == ("head", "Linear", "dtype", "None", "float16")
    assert rows["head", "param_dtype"] == ("head", "Linear", "param_dtype", "float32", "bfloat16")
    assert rows["head/kernel", "value"] == ("head/kernel", "Param", "value", "float32", "bfloat16")
    assert rows["layers/1/linear/bias", "value"].after == "bfloat16"
    assert len(rows) == len(report.settings)
    assert sorted(report.without_dtype) in (["again", "layers/1"], ["layers/0", "layers/1"])
    assert sum(path.endswith("/linear/kernel") for path, _ in rows) == 2  # the shared one once


def test_the_module_computes_so():
    model = Net(nnx.Rngs(0))
    mp.get_policy("mixed_bfloat16").apply_to(model)
    tokens = jnp.arange(4)
    assert nnx.state(model, nnx.Param)["head"]["kernel"][...].dtype == jnp.float32
    assert model.head(model.embed(tokens)).dtype == jnp.bfloat16
    found = str(jax.make_jaxpr(lambda x: nnx.merge(*nnx.split(model.head))(x))(jnp.ones((2, 4))))
    assert "preferred_element_type=bfloat16" in found or "bf16[2,2] = dot_general" in found


def test_overrides_of_modules_and_of_parameters():
    model = Net(nnx.Rngs(0))
    policy = POLICY.with_overrides({r"NORM|.*/linear/bias": "float32", r"head": "params=float32,compute=bfloat16"})
    policy.apply_to(model)
    assert (model.norm.dtype, model.norm.param_dtype, model.norm.scale[...].dtype) == (jnp.float32,) * 3
    assert (model.head.dtype, model.head.param_dtype) == (jnp.bfloat16, jnp.float32)
    assert model.head.kernel[...].dtype == jnp.float32
    linear = model.layers[1].linear
    assert (linear.dtype, linear.kernel[...].dtype, linear.bias[...].dtype) == (
        jnp.float16,
        jnp.bfloat16,
        jnp.float32,
    )


def test_default_overrides_find_norms_and_heads():
    model = Net(nnx.Rngs(0))
    POLICY.with_overrides(mp.default_overrides()).apply_to(model)
    assert model.norm.dtype == model.head.dtype == jnp.float32
    assert model.embed.dtype == jnp.float16


def test_a_layer_by_itself_and_8_bits():
    linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    report = mp.get_policy("mixed_float8").apply_to(linear)
    assert linear.dtype == jnp.bfloat16
    assert [row.path for row in report.settings] == ["", "", "kernel", "bias"]


def test_abstract_modules():
    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    POLICY.apply_to(model)
    assert model.head.kernel.get_value().dtype == jnp.bfloat16


def test_the_table():
    text = str(POLICY.apply_to(Scaled(nnx.Rngs(0))))
    assert text.splitlines()[0].split() == ["path", "module", "attribute", "before", "after"]
    assert any(line.split() == ["linear/kernel", "Param", "value", "float32", "bfloat16"] for line in text.splitlines())
    assert text.splitlines()[-1] == "<root>: no dtype to set, computes as its code says"
    paths = [line.split()[0] for line in text.splitlines()[1:-1]]
    assert paths == ["scale", *["linear"] * 2, "linear/kernel", "linear/bias"]


def test_errors_change_nothing():
    model = Net(nnx.Rngs(0))
    before = bits(nnx.as_pure(nnx.state(model)))
    clash = POLICY.with_overrides({r"he.*": "float32", r".*ad": "float16"})
    with pytest.raises(ValueError, match=r"2 overrides match 'head' and disagree"):
        clash.apply_to(model)
    assert bits(nnx.as_pure(nnx.state(model))) == before
    assert model.embed.dtype is None or model.embed.dtype == jnp.float32
    for wrong in (linen.Dense(2), {"w": jnp.ones(2)}):
        with pytest.raises(TypeError, match=rf"module is a {type(wrong).__name__}(.|\n)*dtype=policy.compute_dtype"):
            POLICY.apply_to(wrong)
    with pytest.warns(UserWarning, match=r"match no path: '.\*nrom'(.|\n)*again/linear/kernel") as caught:
        POLICY.with_overrides({r".*nrom": "float32"}).apply_to(model)
    assert caught[0].filename == __file__
