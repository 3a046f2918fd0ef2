"""Stochastic rounding of weights: where the random bits come from, and that nothing shares them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import bits
from jax.sharding import PartitionSpec as P

import mpjax as mp

pytestmark = pytest.mark.standard_promotion

T = mp.transforms
KEY = jax.random.key(3)
HALF_WAY = -(2.0**-8)  # to the bfloat16 after 1, as a gradient


def rounded(params, key=KEY, steps=1, **options):
    """The parameters after steps that take each half-way to the next value, or further."""
    tx = T.stochastic_rounding(optax.sgd(1.0), key, **options)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = jax.jit(tx.update)(jax.tree.map(lambda p: jnp.full(p.shape, HALF_WAY), params), state, params)
        new = T.apply_updates(params, updates)
    return new


def ups(x):
    return np.asarray(x, np.float32).ravel() > 1


def assert_uncorrelated(*samples):
    for a, b in itertools.combinations(samples, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(len(a))


def ones(n=10_000):
    return jnp.ones(n, jnp.bfloat16)


class TestRandomBits:
    def test_are_those_of_the_key(self):
        assert (
            bits(rounded(ones()))
            == bits(rounded(ones(), jax.random.key(3)))
            != bits(rounded(ones(), jax.random.key(4)))
        )

    def test_differ_from_leaf_to_leaf_and_step_to_step(self):
        tree = {"a": ones(), "b": [ones(), ones()]}
        samples = [ups(x) for x in (*jax.tree.leaves(rounded(tree)), *jax.tree.leaves(rounded(tree, steps=2)))]
        assert all(0.45 < x.mean() < 0.55 for x in samples)
        assert_uncorrelated(*samples, ups(rounded(ones(), jax.random.key(4))))

    def test_do_not_depend_on_leaves_in_float32_being_rounded(self):
        """The place in the tree counts, whatever the other leaves are."""
        a = rounded({"a": ones(), "b": jnp.ones(3), "c": ones()})["c"]
        b = rounded({"a": ones(), "b": jnp.ones(3, jnp.bfloat16), "c": ones()})["c"]
        assert bits(a) == bits(b)

    @pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
    def test_any_implementation_of_keys(self, implementation):
        key = jax.random.key(0, impl=implementation)
        new = rounded(ones(), key)
        assert bits(new) == bits(rounded(ones(), key)) != bits(rounded(ones(), jax.random.key(0)))
        assert 0.45 < ups(new).mean() < 0.55

    def test_members_of_an_ensemble_with_their_own_keys(self):
        def member(key):
            tx = T.stochastic_rounding(optax.sgd(1.0), key)
            return T.apply_updates(ones(), tx.update(jnp.full(10_000, HALF_WAY), tx.init(ones()), ones())[0])

        keys = jax.random.split(KEY, 3)
        members = jax.jit(jax.vmap(member))(keys)
        assert bits(members[1]) == bits(rounded(ones(), keys[1]))
        assert_uncorrelated(*(ups(x) for x in members))


class TestShardMap:
    """Each device sees its own shard, and would draw the bits of every other's."""

    mesh = staticmethod(lambda: jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2))

    def run(self, params, specs, axis_name, check_vma=True):
        tx = T.stochastic_rounding(optax.sgd(1.0), KEY, axis_name=axis_name)
        state = tx.init(params)

        def step(params, state):
            grads = jax.tree.map(lambda p: jnp.full_like(p, HALF_WAY, jnp.float32), params)
            updates, state = tx.update(grads, state, params)
            return T.apply_updates(params, updates), state

        whole = jax.tree.map(lambda x: P(), state)
        sharded = jax.shard_map(
            step, mesh=self.mesh(), in_specs=(specs, whole), out_specs=(specs, whole), check_vma=check_vma
        )
        return jax.jit(sharded)(params, state)[0]

    def shards(self, x):
        return [ups(s.data) for s in x.addressable_shards]

    @pytest.mark.parametrize("check_vma", [True, False])
    @pytest.mark.parametrize(
        ("spec", "axis_name"),
        [
            (P(("a", "b")), ("a", "b")),
            (P("a", "b"), ["a", "b"]),
            (P("b", "a"), P("b", "a")),
            (P(None, ("b", "a")), P(None, ("b", "a"))),
        ],
    )
    def test_shards_draw_their_own(self, spec, axis_name, check_vma):
        new = self.run(jnp.ones((64, 256), jnp.bfloat16), spec, axis_name, check_vma)
        assert_uncorrelated(*self.shards(new))

    @pytest.mark.parametrize("check_vma", [True, False])
    @pytest.mark.parametrize("axis_name", ["a", P("a")], ids=str)
    def test_replicas_round_alike(self, axis_name, check_vma):
        """Sharded over one axis, replicated over the other."""
        new = self.run(jnp.ones((64, 256), jnp.bfloat16), P("a"), axis_name, check_vma)
        shards = np.stack(self.shards(new)).reshape(4, 2, -1)
        assert (shards[:, 0] == shards[:, 1]).all()
        assert_uncorrelated(*shards[:, 0])

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_each_parameter_by_its_spec(self, check_vma):
        params = {"w": ones(8000), "bias": ones(1000), "deep": {"x": ones(8000), "y": ones(8000)}, "none": None}
        specs = {"w": P("a"), "bias": P(), "deep": P(("a", "b")), "none": None}
        full = {**specs, "deep": {"x": specs["deep"], "y": specs["deep"]}}
        new = self.run(params, full, specs, check_vma)
        bias = self.shards(new["bias"])
        assert all((x == bias[0]).all() for x in bias)
        assert bits(new["bias"]) == bits(self.run(params, full, full, check_vma)["bias"])
        w = np.stack(self.shards(new["w"])).reshape(4, 2, -1)
        assert (w[:, 0] == w[:, 1]).all()
        assert_uncorrelated(*w[:, 0])
        assert_uncorrelated(*self.shards(new["deep"]["x"]), *self.shards(new["deep"]["y"]))

    def test_without_axis_name_all_shards_round_alike(self):
        """Why it is there: by default a parameter is taken for replicated."""
        shards = self.shards(self.run(ones(8000), P(("a", "b")), None))
        assert all((x == shards[0]).all() for x in shards)


class TestFp8:
    @pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
    @pytest.mark.parametrize("grads_dtype", ["float32", "bfloat16", "same"])
    def test_adamw_in_float32_for_fp8_weights(self, dtype, grads_dtype):
        """The mean of many weights goes where float32's goes, and no moment is kept in fp8."""
        n = 20_000
        tx = mp.loss_scaled(T.stochastic_rounding(optax.adamw(1e-2), KEY), mp.StaticLossScale(8.0))
        plain = optax.adamw(1e-2)
        params, full = {"w": jnp.ones(n, dtype)}, {"w": jnp.ones(n)}
        state, full_state = tx.init(params), plain.init(full)
        assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32", "uint32"}
        for value in (1.0, 2.0, -0.5, 1.0):
            grads = jnp.full(n, 8 * value).astype(dtype if grads_dtype == "same" else grads_dtype)
            if grads_dtype == "same":  # fp8 is not scaled
                grads = jnp.full(n, value).astype(dtype)
            updates, state = jax.jit(tx.update)({"w": grads}, state, params)
            params = T.apply_updates(params, updates)
            updates, full_state = jax.jit(plain.update)({"w": jnp.full(n, value)}, full_state, full)
            full = optax.apply_updates(full, updates)
        weights = np.asarray(params["w"].astype(jnp.float32))
        assert params["w"].dtype == dtype
        assert abs(weights.mean() - float(full["w"][0])) < 4 * weights.std() / np.sqrt(n)
        assert weights.std() > 0.01


class TestState:
    def test_is_numbers(self):
        state = T.stochastic_rounding(optax.sgd(1.0), KEY).init(ones())
        assert (state.key.dtype, state.step.dtype) == (jnp.uint32, jnp.int32)
        assert bits(state.key) == bits(jax.random.key_data(KEY))

    def test_counts_up_to_the_last_int32(self):
        tx = T.stochastic_rounding(optax.sgd(1.0), KEY)
        state = tx.init(ones())._replace(step=jnp.int32(2**31 - 1))
        assert int(tx.update(ones(), state, ones())[1].step) == 2**31 - 1

    def test_the_next_init_finds_the_key_alive(self):
        tx = T.stochastic_rounding(optax.sgd(1.0), jax.random.key(5))
        jax.block_until_ready(jax.jit(lambda s: s._replace(step=s.step + 1), donate_argnums=0)(tx.init(ones())))
        assert bits(tx.init(ones()).key) == bits(jax.random.key_data(jax.random.key(5)))


@pytest.mark.parametrize("key", [0, None, jax.random.PRNGKey(0), jax.random.split(jax.random.key(0)), jnp.ones(())])
def test_key_is_no_typed_key(key):
    with pytest.raises(TypeError, match="one typed PRNG key") as error:
        T.stochastic_rounding(optax.sgd(0.1), key)
    assert "jax.random.key(0)" in str(error.value)
