"""`record_amax`: the numbers are those of the modules, through every transformation, and the step stays as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax as mp

W, X = 2 * jnp.eye(4), jnp.arange(32.0).reshape(8, 4)


def record(fn, *args, **options):
    return jax.jit(mp.diagnostics.record_amax(fn, **options))(*args)


def two_modules(w, x):
    with jax.named_scope("first"):
        h = x @ w
    with jax.named_scope("second"):
        return jnp.tanh(h @ w).sum() + 1000.0


class TestNumbers:
    def test_of_matrix_work(self):
        result, amaxes = record(two_modules, W, X)
        assert result == two_modules(W, X)
        assert amaxes.to_dict() == {"first/forward/float32": 62, "second/forward/float32": 124}
        assert amaxes.values.dtype == jnp.float32

    def test_of_all_operations(self):
        _, amaxes = record(two_modules, W, X, kinds="all")
        assert amaxes.to_dict() == {"first/forward/float32": 62, "second/forward/float32": two_modules(W, X)}

    def test_of_some_modules(self):
        assert record(two_modules, W, X, only="sec.*")[1].paths == ("second",)
        _, none = record(two_modules, W, X, only="third")
        assert (none.to_dict(), none.overflowed, str(none)) == ({}, (), "Every module is finite.")

    def test_the_order_is_that_of_the_program(self):
        def fn(w, x):
            for name in "zab":
                with jax.named_scope(name):
                    x = x @ w
            return x

        assert record(fn, W, X)[1].paths == ("z", "a", "b")

    @pytest.mark.parametrize("around", [jax.value_and_grad, lambda fn: jax.checkpoint(fn)], ids=["grad", "remat"])
    def test_the_result_is_what_it_is_without(self, around):
        fn = around(mp.autocast(two_modules, "mixed_bfloat16"))
        result, amaxes = record(fn, W, X)
        jax.tree.map(np.testing.assert_array_equal, result, jax.jit(fn)(W, X))
        assert set(amaxes.dtypes) == {"bfloat16"}


class TestBackward:
    def test_of_a_gradient_function(self):
        with jax.default_matmul_precision("float32"):
            _, amaxes = record(jax.grad(lambda w, x: 3 * two_modules(w, x), argnums=1), W, X * 0)
        found = amaxes.to_dict()
        assert (found["second/backward/float32"], found["first/backward/float32"]) == (6, 12)
        assert amaxes.paths[:2] == ("first", "second")

    def test_a_gradient_of_the_recorded(self):
        """The forward pass alone; its rules survive, and gradients are as without."""

        def loss_fn(w, x):
            return jax.nn.relu(two_modules(w, x) - 1000.0)

        recorded = jax.value_and_grad(mp.diagnostics.record_amax(loss_fn), has_aux=True)
        (_, amaxes), grads = jax.jit(recorded)(W, X)
        np.testing.assert_array_equal(grads, jax.jit(jax.grad(loss_fn))(W, X))
        assert amaxes.directions == ("forward", "forward")

    def test_a_scaled_loss_that_overflows(self):
        cast = mp.autocast(two_modules, "mixed_float16")
        _, amaxes = record(mp.value_and_grad(cast, mp.StaticLossScale(2.0**30)), W, X * 0)
        assert amaxes.overflowed[0].endswith("backward/float16")
        assert "forward" not in "".join(amaxes.overflowed)


class TestInside:
    def test_scan(self):
        def fn(w, x):
            def step(c, _):
                with jax.named_scope("block"):
                    return c @ w, None

            return jax.lax.scan(step, x, None, length=3)[0]

        result, amaxes = record(fn, W, X)
        assert amaxes.to_dict() == {"block/forward/float32": 31 * 8}
        np.testing.assert_array_equal(result, X * 8)
        _, backward = record(jax.grad(lambda w, x: fn(w, x).sum(), argnums=1), W, X)
        assert backward.to_dict()["block/backward/float32"] == 8

    def test_while(self):
        def fn(w, x):
            return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ w), (0, x))

        result, amaxes = record(fn, W, X)
        assert amaxes.to_dict() == {"forward/float32": 31 * 8}
        assert result[0] == 3

    def test_cond(self):
        def fn(w, x, flag):
            def branch(name):
                def run(x):
                    with jax.named_scope(name):
                        return x @ w

                return run

            return jax.lax.cond(flag, branch("yes"), branch("no"), x)

        for flag in (True, False):
            _, amaxes = record(fn, W, X, jnp.asarray(flag))
            assert amaxes.to_dict() == {"no/forward/float32": 62 * (not flag), "yes/forward/float32": 62 * flag}

    def test_vmap(self):
        _, amaxes = jax.vmap(mp.diagnostics.record_amax(two_modules), (None, 0))(W, X[:, None])
        assert amaxes.values.shape == (8, 2)
        assert amaxes.to_dict()["first/forward/float32"] == 62, "the largest of all"

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_shard_map(self, check_vma):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

        def local(w, x):
            def body(c):
                return c[0] + 1, c[1] @ w

            y = jax.lax.cond(x[0, 0] > 8, lambda x: x @ w, lambda x: x, x)
            _, y = jax.lax.while_loop(lambda c: c[0] < 2, body, (0, y))
            return jax.lax.psum(y.sum(), "data")

        specs = (P(), P("data"))
        fn = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
        result, amaxes = record(fn, W, X)
        assert result == jax.jit(fn)(W, X)
        assert amaxes.to_dict() == {"forward/float32": 31 * 8}

    def test_nan_on_one_device(self):
        """XLA's maximum over devices passes over it."""
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        x = jax.device_put(jnp.ones((8, 2)).at[6].set(jnp.nan), NamedSharding(mesh, P("data")))
        fn = lambda x, w: x @ w
        for one in (fn, jax.shard_map(fn, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))):
            _, amaxes = record(one, x, jnp.ones((2, 2)))
            assert np.isnan(amaxes.values).all()
            assert amaxes.overflowed == ("forward/float32",)

    def test_shardings_of_a_nested_jit_are_kept(self):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        rows = jax.sharding.NamedSharding(mesh, P("data"))
        fn = jax.jit(lambda w, x: x @ w, out_shardings=rows)
        result, _ = record(fn, W, X)
        assert result.sharding.is_equivalent_to(rows, 2)

    def test_linen_modules(self):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(2, name="out")(nn.relu(nn.Dense(4, name="hidden")(x)))

        params = Model().init(jax.random.key(0), X)
        _, amaxes = record(Model().apply, params, X)
        assert amaxes.paths == ("Model/hidden", "Model/out")

    def test_a_kernel_with_its_own_rule_counts_by_its_results(self):
        @jax.custom_vjp
        def attention(x, w):
            return jnp.tanh(x @ w) / 2

        attention.defvjp(lambda x, w: (attention(x, w), (x, w)), lambda kept, ct: (ct @ kept[1].T, kept[0].T @ ct))
        _, amaxes = record(attention, X, W)
        assert amaxes.to_dict() == {"forward/float32": 0.5}


class TestRun:
    @pytest.mark.standard_promotion
    def test_dumped_on_the_first_skip(self):
        """A run at a growing loss scale: every step records, and the first that is skipped is shown."""
        tx = mp.loss_scaled(optax.sgd(1e-3), mp.DynamicLossScale(2.0**12, period=1, factor=4))
        cast = mp.autocast(two_modules, "mixed_float16")

        @jax.jit
        def train_step(params, opt_state, x):
            step = mp.diagnostics.record_amax(mp.value_and_grad(cast, mp.get_loss_scale(opt_state)))
            (_, grads), amaxes = step(params, x)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, amaxes

        params, opt_state = W, tx.init(W)
        for _ in range(4):
            params, opt_state, amaxes = train_step(params, opt_state, X / 100)
            if amaxes.overflowed:
                break
        lines = str(amaxes).splitlines()
        assert lines[0] == f"The first to overflow: {amaxes.overflowed[0]}."
        assert amaxes.overflowed[0].endswith("backward/float16")
        assert lines[1].startswith("  first/forward/float16: 0.61")
        assert lines[1].endswith(", 0.0% of float16's range")
        assert train_step._cache_size() == 1

    def test_through_scan_and_back(self):
        def step(w, x):
            loss, amaxes = mp.diagnostics.record_amax(two_modules)(w, x)
            return w, (loss, amaxes)

        _, (_, amaxes) = jax.jit(lambda w, xs: jax.lax.scan(step, w, xs))(W, jnp.stack([X, X / 2]))
        np.testing.assert_array_equal(amaxes.values, [[62, 124], [31, 62]])
        rows = jax.tree.map(lambda x: x[1], amaxes)
        assert rows.to_dict() == {"first/forward/float32": 31, "second/forward/float32": 62}
        assert str(jax.eval_shape(lambda: amaxes)).startswith("Amaxes(values=ShapeDtypeStruct")

    def test_float16_is_rounded_before_it_is_measured(self):
        """XLA keeps the product in float32 where float16 is only passed through."""

        def fn(x):
            return (x.astype(jnp.float16) * jnp.float16(4)).astype(jnp.float32)

        _, amaxes = record(fn, jnp.full(4, 2.0**15), kinds="all")
        assert amaxes.to_dict()["forward/float16"] == jnp.inf


class TestErrors:
    def test_kinds(self):
        with pytest.raises(ValueError, match=r"kinds is 'conv'(.|\n)*\"matmul\" or \"all\""):
            mp.diagnostics.record_amax(two_modules, kinds="conv")

    def test_only(self):
        with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
            mp.diagnostics.record_amax(two_modules, only="(")
        with pytest.raises(TypeError, match="expected: a regular expression as a string"):
            mp.diagnostics.record_amax(two_modules, only=3)
