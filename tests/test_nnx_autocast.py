"""Autocast and modules: Flax NNX through `mp.nnx.autocast`; Linen, equinox and haiku as they are."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jaxprs import matrix_dtypes

import mpjax as mp

# Flax and optax rely on implicit promotion.
pytestmark = pytest.mark.standard_promotion

POLICIES = ["mixed_bfloat16", "mixed_float16"]
X = jax.random.normal(jax.random.key(0), (16, 4))


class Calls(nnx.Variable):
    """How often a module was called."""


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.last = nnx.Linear(8, 2, rngs=rngs)
        self.calls = Calls(jnp.int32(0))
        self.largest = Calls(jnp.float32(0.0))
        self.half = Calls(jnp.zeros((), jnp.float16))

    def __call__(self, x):
        h = self.dropout(nnx.relu(self.norm(self.first(x))))
        self.calls[...] = self.calls[...] + 1
        self.largest[...] = jnp.maximum(self.largest[...], h.max())
        self.half[...] = h.max().astype(jnp.float16)
        return self.last(h)


def net(seed=0):
    return Net(nnx.Rngs(seed))


def loss(model, x):
    return (model(x) ** 2).mean()


def autocast(fn, policy="mixed_bfloat16", **options):
    return mp.nnx.autocast(fn, policy, **options)


def state_of(model):
    """Everything in a module, by path; random keys as numbers."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {path: as_numbers(variable.get_value()) for path, variable in flat}


def as_numbers(x):
    x = jnp.stack(x) if isinstance(x, tuple) else x  # what was sown
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def assert_like(model, reference, rtol=0.03):
    """Same variables in the same dtypes: integers, keys and counts equal, floats close."""
    got, expected = state_of(model), state_of(reference)
    assert got.keys() == expected.keys()
    for path, x in expected.items():
        assert got[path].dtype == x.dtype, path
        if jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_allclose(got[path], x, rtol=rtol, atol=rtol * float(jnp.abs(x).max()), err_msg=str(path))
        else:
            np.testing.assert_array_equal(got[path], x, err_msg=str(path))


def weights_dtypes(fn, model, x):
    """The dtypes of all matrix work of a function of a module."""
    graph, state = nnx.split(model)
    return matrix_dtypes(lambda state, x: jax.tree.leaves(fn(nnx.merge(graph, state), x)), state, x)


TAKEN = {
    "eager": lambda f: f,
    "nnx.jit": nnx.jit,
    "nnx.value_and_grad": lambda f: lambda *args: nnx.value_and_grad(f)(*args)[0],
    "nnx.jit of value_and_grad": lambda f: nnx.jit(lambda *args: nnx.value_and_grad(f)(*args)[0]),
    "nnx.remat": lambda f: lambda *args: nnx.value_and_grad(nnx.remat(f))(*args)[0],
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("taken", TAKEN)
class TestWhatFlowsBack:
    def test_statistics_counts_and_variables(self, taken, policy):
        model, reference = net(), net()
        cast = TAKEN[taken](autocast(loss, policy))
        for i in range(3):
            got, expected = cast(model, X + i), loss(reference, X + i)
            assert got.dtype == jnp.float32
            assert float(got) == pytest.approx(float(expected), rel=0.03)
            assert_like(model, reference)
        assert model.calls[...] == 3
        assert model.half[...].dtype == jnp.float16
        assert nnx.state(model.dropout, nnx.RngCount)["rngs"]["count"][...] == 3

    def test_matrix_work_is_low(self, taken, policy):
        low = str(mp.get_policy(policy).compute_dtype)
        assert weights_dtypes(TAKEN[taken](autocast(loss, policy)), net(), X) == {low}
        assert weights_dtypes(TAKEN[taken](loss), net(), X) == {"float32"}


class TestGradients:
    @pytest.mark.parametrize("policy", POLICIES)
    def test_of_parameters(self, policy):
        model = net()
        grads = nnx.grad(autocast(loss, policy))(model, X)
        for path, g in nnx.to_flat_state(grads):
            assert g[...].dtype == jnp.float32, path
        expected = nnx.grad(loss)(net(), X)
        largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.05 * largest), grads, expected)

    def test_of_one_kind_of_variables(self):
        model = net()
        grads = nnx.grad(autocast(loss), argnums=nnx.DiffState(0, nnx.PathContains("last")))(model, X)
        assert list(grads) == ["last"]


class Sowing(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        y = self.linear(x)
        self.sow(nnx.Intermediate, "seen", y)
        return y.sum()


class TestModulesChange:
    @pytest.mark.filterwarnings("ignore:Using 'Module.sow")  # deprecated, not gone
    def test_new_variables(self):
        model, reference = Sowing(nnx.Rngs(0)), Sowing(nnx.Rngs(0))
        autocast(lambda m, x: m(x))(model, X)
        reference(X)
        assert [y.dtype for y in model.seen.get_value()] == [jnp.float32]
        assert_like(model, reference)
        assert nnx.pop(model, nnx.Intermediate)
        assert not hasattr(model, "seen")

    def test_a_module_made_inside_is_returned(self):
        def fn(model, x):
            new = nnx.Linear(4, 3, rngs=nnx.Rngs(1))
            return {"new": new, "y": new(x), "model": model, "name": "kept", "n": 3}

        model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        out = autocast(fn)(model, X)
        assert out["model"] is model
        assert (out["name"], out["n"]) == ("kept", 3)
        np.testing.assert_array_equal(out["new"].kernel[...], nnx.Linear(4, 3, rngs=nnx.Rngs(1)).kernel[...])
        assert out["new"].kernel[...].dtype == out["y"].dtype == jnp.float32

    def test_a_module_in_two_arguments_is_one(self):
        def fn(pair, again, x):
            assert pair["a"] is again
            again.calls[...] = again.calls[...] + 1
            pair["a"].calls[...] = pair["a"].calls[...] + 1
            return loss(pair["a"], x)

        model = net()
        autocast(fn)({"a": model, "b": None}, again=model, x=X)
        assert model.calls[...] == 3

    def test_a_submodule_beside_its_parent_is_one(self):
        def fn(model, last, x):
            last.kernel[...] = jnp.zeros_like(last.kernel[...])
            return model(x)

        model = net()
        out = autocast(fn)(model, model.last, X)
        np.testing.assert_array_equal(out, jnp.zeros((16, 2)))
        np.testing.assert_array_equal(model.last.kernel[...], jnp.zeros((8, 2)))

    def test_a_variable_as_an_argument(self):
        total = nnx.Variable(jnp.zeros(2))

        def fn(total, x):
            total[...] = total[...] + x
            return total[...] * 2

        out = autocast(fn)(total, jnp.ones(2))
        np.testing.assert_array_equal(total[...], jnp.ones(2))
        np.testing.assert_array_equal(out, jnp.full(2, 2.0))

    def test_no_module_at_all(self):
        np.testing.assert_allclose(autocast(lambda x: x @ x.T)(X), X @ X.T, rtol=0.02, atol=0.05)

    def test_cast_outputs(self):
        model = net()
        out = autocast(lambda m, x: (m(x), m), mp.get_policy("params=float32,compute=bfloat16,output=bfloat16"))
        assert out(model, X)[0].dtype == jnp.float32
        cast = autocast(
            lambda m, x: (m(x), m), mp.get_policy("params=float32,compute=bfloat16,output=bfloat16"), cast_outputs=True
        )
        y, same = cast(model, X)
        assert y.dtype == jnp.bfloat16
        assert same.last.kernel[...].dtype == jnp.float32

    def test_rules(self):
        rules = mp.default_rules().with_rule("dot_general", "full", "for a test")
        assert weights_dtypes(autocast(loss, rules=rules), net(), X) == {"float32"}

    def test_the_float32_policy_changes_nothing(self):
        model, reference = net(), net()
        assert float(autocast(loss, "float32")(model, X)) == pytest.approx(float(loss(reference, X)), rel=1e-6)
        assert_like(model, reference, rtol=1e-6)

    def test_an_exception_leaves_the_module_usable(self):
        model = net()

        def failing(model, x):
            model.calls[...] = model.calls[...] + 1
            raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"):
            autocast(failing)(model, X)
        reference = net()
        autocast(loss)(model, X)
        loss(reference, X)
        assert int(model.calls[...]) in (1, 2)
        assert not isinstance(model.calls[...], jax.core.Tracer)


class TestEagerCalls:
    def test_are_traced_once(self, count_traces):
        counted = count_traces(lambda model, x: model(x))
        model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        cast = autocast(counted)
        for _ in range(3):
            cast(model, X)
        assert counted.traces == 1
        cast(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), X)
        assert counted.traces == 2

    def test_with_random_numbers_and_statistics_too(self, count_traces):
        counted = count_traces(loss)
        model, cast = net(), autocast(counted)
        for _ in range(4):
            cast(model, X)
        # BatchNorm and Dropout change arrays, not the structure.
        assert counted.traces <= 2

    def test_see_updates_in_place(self):
        model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        cast = autocast(lambda model, x: model(x))
        before = cast(model, X)
        model.kernel[...] = model.kernel[...] * 0
        np.testing.assert_array_equal(cast(model, X), jnp.zeros((16, 3)))
        assert float(jnp.abs(before).max()) > 0

    def test_see_a_new_configuration(self):
        """eval() changes attributes that are no arrays."""
        model, cast = net(), autocast(lambda model, x: model(x))
        cast(model, X)
        model.eval()
        calls = [cast(model, X) for _ in range(2)]
        np.testing.assert_array_equal(*calls)
        model.train()
        noisy = [cast(model, X) for _ in range(2)]
        assert not np.array_equal(*noisy)

    def test_see_a_closed_over_module(self):
        """It is no argument: its arrays are constants of the trace, and read again at each call."""
        model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        cast = autocast(lambda x: model(x))
        cast(X)
        model.kernel[...] = model.kernel[...] * 0
        np.testing.assert_array_equal(cast(X), jnp.zeros((16, 3)))


class Layers(nnx.Module):
    """A scan over layers, each with its dropout and its own statistics."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return x + jnp.tanh(layer(x))

        return run(x, self.layers)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("place", ["scan inside", "remat inside", "autocast inside a scan"])
def test_scans_over_layers(place, policy):
    model = Layers(nnx.Rngs(0))

    def fn(model, x):
        run = nnx.remat(lambda model, x: model(x)) if place == "remat inside" else lambda model, x: model(x)
        return (run(model, x) ** 2).mean()

    def of_each(model, x):
        step = mp.nnx.autocast(lambda layer, x: x + jnp.tanh(layer(x)), policy)
        run = nnx.scan(lambda x, layer: step(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return (run(x, model.layers) ** 2).mean()

    cast = of_each if place == "autocast inside a scan" else mp.nnx.autocast(fn, policy)
    low = str(mp.get_policy(policy).compute_dtype)
    assert weights_dtypes(nnx.grad(cast), model, X) == {low}
    (value, grads), (true, expected) = nnx.value_and_grad(cast)(model, X), nnx.value_and_grad(fn)(model, X)
    assert float(value) == pytest.approx(float(true), rel=0.02)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.05 * largest), grads, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_training_loop(policy):
    policy = mp.get_policy(policy)
    model = net()
    tx = mp.loss_scaled(optax.adam(3e-2), policy.loss_scale())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    targets = jnp.stack([X.sum(1), X[:, 0]], 1)

    loss_fn = mp.nnx.autocast(lambda model, x, y: ((model(x) - y) ** 2).mean(), policy)

    @nnx.jit
    def step(model, optimizer, x, y):
        scale = mp.get_loss_scale(optimizer.opt_state)
        value, grads = nnx.value_and_grad(lambda *args: scale.scale(loss_fn(*args)))(model, x, y)
        optimizer.update(model, grads)
        return scale.unscale(value)

    losses = [float(step(model, optimizer, X, targets)) for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
    assert model.calls[...] == 60
    assert all(v[...].dtype == jnp.float32 for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param)))


# Other libraries' modules need nothing ------------------------------------------------------------


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dropout(0.25, deterministic=False)(nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x)))
        self.sow("intermediates", "hidden", h)
        count = self.variable("counts", "calls", lambda: jnp.int32(0))
        count.value = count.value + 1
        return nn.Dense(2)(h)


@pytest.mark.parametrize("policy", POLICIES)
class TestOtherLibraries:
    def test_linen_with_mutable_collections(self, policy):
        model, rngs = LinenNet(), {"dropout": jax.random.key(2)}
        variables = model.init({"params": jax.random.key(1), **rngs}, X)

        def apply(variables, x):
            return model.apply(variables, x, rngs=rngs, mutable=["batch_stats", "counts", "intermediates"])

        cast = mp.autocast(apply, policy)
        assert matrix_dtypes(cast, variables, X) == {str(mp.get_policy(policy).compute_dtype)}
        (out, updated), (true, expected) = cast(variables, X), apply(variables, X)
        assert jax.tree.structure(updated) == jax.tree.structure(expected)
        assert jax.tree.map(jax.typeof, updated) == jax.tree.map(jax.typeof, expected)
        assert updated["counts"] == expected["counts"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=0.05), updated, expected)
        np.testing.assert_allclose(out, true, rtol=0.05, atol=0.05)

    def test_equinox(self, policy):
        model = eqx.nn.MLP(4, 2, 8, 2, key=jax.random.key(1))
        loss_fn = lambda model, x: (jax.vmap(model)(x) ** 2).mean()
        cast = mp.autocast(loss_fn, policy)
        assert matrix_dtypes(lambda x: eqx.filter_grad(cast)(model, x), X) == {str(mp.get_policy(policy).compute_dtype)}
        value, grads = eqx.filter_jit(eqx.filter_value_and_grad(cast))(model, X)
        true, expected = eqx.filter_value_and_grad(loss_fn)(model, X)
        assert float(value) == pytest.approx(float(true), rel=0.02)
        assert jax.tree.structure(grads) == jax.tree.structure(expected)
        largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
            assert a.dtype == jnp.float32
            np.testing.assert_allclose(a, b, atol=0.05 * largest)

    def test_haiku_with_state(self, policy):
        def forward(x):
            h = hk.BatchNorm(True, True, 0.5)(hk.Linear(8)(x), is_training=True)
            calls = hk.get_state("calls", (), jnp.int32, jnp.zeros)
            hk.set_state("calls", calls + 1)
            return hk.Linear(2)(hk.dropout(hk.next_rng_key(), 0.25, h))

        model = hk.transform_with_state(forward)
        key = jax.random.key(3)
        params, state = model.init(key, X)
        cast = mp.autocast(model.apply, policy)
        assert matrix_dtypes(cast, params, state, key, X) == {str(mp.get_policy(policy).compute_dtype)}
        (out, new), (true, expected) = cast(params, state, key, X), model.apply(params, state, key, X)
        np.testing.assert_allclose(out, true, rtol=0.05, atol=0.05)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.03, atol=0.03), new, expected)
        assert new["~"]["calls"] == 1
