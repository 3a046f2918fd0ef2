"""Masters, whole and as remainders: what the weights are, re-seeding, and that both are the same bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import bits
from hypothesis import given
from hypothesis import strategies as st

import mpjax as mp
from mpjax.transforms._master_weights import _join, _split
from mpjax.transforms._rounding import nearest

pytestmark = pytest.mark.standard_promotion

T = mp.transforms
FORMS = ["float32", "remainder"]
DTYPES = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
BFLOAT16_MAX = float(jnp.finfo(jnp.bfloat16).max)


# Its steps are the gradients: the masters are then known.
STEP = {form: T.master_weights(optax.identity(), form=form) for form in FORMS}
UPDATE = {form: jax.jit(tx.update) for form, tx in STEP.items()}


def masters_of(params, state):
    """The float32 masters, whatever the form."""
    if state.masters.dtype == jnp.float32:
        return np.asarray(state.masters)
    code, remainder = np.asarray(params).view(np.uint16).astype(np.int64), np.asarray(state.masters).astype(np.int64)
    zero, negative = (code & 0x7FFF) == 0, code >> 15
    magnitude = np.where(zero, remainder & 0x7FFF, ((code & 0x7FFF) << 16) + remainder)
    return (np.where(zero, remainder < 0, negative) << 31 | magnitude).astype(np.uint32).view(np.float32)


def away_from_zero(master):
    """The nearest bfloat16, ties away from zero."""
    code = np.asarray(master, np.float32).view(np.uint32)
    return ((code + 0x8000) >> 16).astype(np.uint16).view(jnp.bfloat16)


class TestWeightsAreRoundedMasters:
    """`optax.apply_updates(params, updates)` is `master.astype(dtype)`."""

    def run(self, master, step, dtype):
        """One step from a state with the given masters: the old parameters, the new ones, the new state."""
        params = nearest(master, dtype, saturate=True)
        updates, state = UPDATE["float32"](step, T.MasterWeightsState(optax.EmptyState(), master), params)
        assert updates.dtype == jnp.float32
        new = T.apply_updates(params, updates)
        if jnp.dtype(dtype).itemsize == 2:
            assert bits(optax.apply_updates(params, updates)) == bits(new)
        return params, new, state

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["any", "equal and opposite", "twice and opposite", "ratio", "cancelling", "ties"])
    def test_adversarial_steps(self, dtype, kind):
        rng = np.random.default_rng(0)
        n = 100_000
        w = (rng.normal(size=n) * 2.0 ** rng.integers(-50 if dtype == "bfloat16" else -30, 17, n)).astype(np.float32)
        few = rng.integers(-64, 64, n) * 2.0**-23
        step = {
            "any": np.roll(w, 1),
            "equal and opposite": -w * (1 + few),
            "twice and opposite": -2 * w * (1 + few),
            "ratio": w * 2.0 ** rng.integers(-30, 30, n) * rng.choice([-1, 1], n),
            "cancelling": -w + rng.normal(size=n) * np.abs(w) * 2.0 ** rng.integers(-40, 0, n),
            "ties": np.asarray(nearest(w, dtype, saturate=True).astype(jnp.float32)) * (1 + 2.0**-8 + few) - w,
        }[kind].astype(np.float32)
        old, new, state = self.run(jnp.asarray(w), jnp.asarray(step), dtype)
        np.testing.assert_array_equal(state.masters, w + step)
        old, got, want = (
            np.asarray(x).astype(np.float64) for x in (old, new, nearest(state.masters, dtype, saturate=True))
        )
        # The one exception: old is a power of two, to which its master was rounded up, and new is past zero and tiny.
        # The float32 numbers beyond -old are too far apart for an update that takes it there.
        impossible = (np.frexp(old)[0] == -0.5 * np.sign(want)) & (np.abs(want) < np.abs(old) * 2.0**-14)
        np.testing.assert_array_equal(got[~impossible], want[~impossible])
        assert (np.abs(got - want) <= np.abs(old) * 2.0**-23).all()
        assert (got != want).mean() < 2e-3

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @given(data=st.data())
    def test_any_master_any_step(self, dtype, data):
        number = st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False)
        w, step = (np.float32(data.draw(number)) for _ in range(2))
        with np.errstate(over="ignore"):
            old, got, state = self.run(jnp.asarray(w)[None], jnp.asarray(step)[None], dtype)
            want = np.asarray(nearest(state.masters, dtype, saturate=True))[0]
        assert np.float32(got[0]) == np.float32(want) or abs(np.float64(got[0]) - want) <= 2.0**-23 * abs(
            np.float64(old[0])
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_never_inf(self, dtype):
        """A float16 master beyond 65504 saturates the weight, and steps back from where it is."""
        largest = float(jnp.finfo(dtype).max)
        if dtype == "bfloat16":
            master, beyond, back = largest * 1.003, largest * 1e-6, -largest * 0.5
        else:
            master, beyond, back = largest * 1.5, largest, -largest
        pair = lambda x: jnp.array([x, -x], jnp.float32)
        old, new, state = self.run(pair(master), pair(beyond), dtype)
        for weights in (old, new):
            assert weights.astype(jnp.float32).tolist() == [largest, -largest]
        _, new, state = self.run(state.masters, pair(back), dtype)
        np.testing.assert_allclose(state.masters, pair(master + beyond + back), rtol=1e-6)
        np.testing.assert_array_equal(
            new.astype(jnp.float32), nearest(state.masters, dtype, saturate=True).astype("f4")
        )

    def test_negative_zero_stays(self):
        for form in FORMS:
            tx = T.master_weights(optax.sgd(1.0), form=form)
            params = jnp.array([-0.0, 0.0, -0.0, 1.0], jnp.bfloat16)
            updates, state = tx.update(jnp.zeros(4), tx.init(params), params)
            assert bits(optax.apply_updates(params, updates)) == bits(params)
            assert np.signbit(masters_of(params, state)).tolist() == [True, False, True, False]


class TestReseeding:
    def test_parameters_that_are_not_their_master_are_the_new_one(self):
        params, steps = jnp.array([1.0, 2.0, 3.0, 4.0], jnp.bfloat16), jnp.full(4, 1e-4)
        _, state = UPDATE["float32"](steps, STEP["float32"].init(params), params)
        loaded = params.at[1].set(7.0).at[3].set(-0.5)
        updates, state = UPDATE["float32"](steps, state, loaded)
        expected = [np.float32(1 + 1e-4) + np.float32(1e-4), 7.0001, np.float32(3 + 1e-4) + np.float32(1e-4), -0.4999]
        np.testing.assert_array_equal(state.masters, np.float32(expected))
        assert bits(optax.apply_updates(loaded, updates)) == bits(loaded)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_masters_own_rounding_never_is(self, dtype):
        """Every value, its ties, both zeros, subnormal numbers and what saturates keep their masters."""
        width = 8 * jnp.dtype(dtype).itemsize
        every = np.arange(2**width).astype(f"uint{width}").view(dtype).astype(np.float32)
        every = every[np.isfinite(every)]
        with np.errstate(over="ignore"):
            master = np.concatenate([every * np.float32(f) for f in (1, 1 + 2.0**-9, 1 - 2.0**-9, 1 + 2.0**-5)])
        master = master[np.isfinite(master) & ~((np.abs(master) > 0) & (np.abs(master) < 1.2e-38))]
        params = nearest(master, dtype, saturate=True)
        state = T.MasterWeightsState(optax.EmptyState(), jnp.asarray(master))
        updates, state = UPDATE["float32"](-jnp.zeros(master.shape), state, params)
        assert bits(state.masters) == bits(jnp.asarray(master))
        assert bits(T.apply_updates(params, updates)) == bits(params)

    def test_a_zero_of_the_other_sign_is_not_another_weight(self):
        """A float16 master of -1e-9 has the weight -0.0, which no update makes of 1.0."""
        master = jnp.array([-1e-9, 1e-9], jnp.float32)
        state = T.MasterWeightsState(optax.EmptyState(), master)
        updates, state = UPDATE["float32"](-jnp.zeros(2), state, jnp.array([0.0, -0.0], jnp.float16))
        assert bits(state.masters) == bits(master)
        assert not updates.any()

    def test_a_loaded_inf_is_not_nan(self):
        loaded = jnp.array([jnp.inf, -jnp.inf], jnp.bfloat16)
        state = T.MasterWeightsState(optax.EmptyState(), jnp.array([77, -77], jnp.int16))
        updates, _ = UPDATE["remainder"](jnp.ones(2), state, loaded)
        assert bits(optax.apply_updates(loaded, updates)) == bits(loaded)

    @given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=8, max_size=8))
    def test_remainders_displace_loaded_parameters_by_half_a_spacing_at_most(self, values):
        """16 bits cannot tell whose they are. The weights are those that were loaded, all the same."""
        # Displaced below the smallest normal number, a master may be flushed to zero where it is stepped.
        loaded = jnp.array([x if abs(x) > 1e-30 else 0.0 for x in values], jnp.bfloat16)
        other = T.MasterWeightsState(optax.EmptyState(), jnp.arange(-4, 4, dtype=jnp.int16) * 8191 + 100)
        updates, state = UPDATE["remainder"](-jnp.zeros(8), other, loaded)
        assert bits(optax.apply_updates(loaded, updates)) == bits(loaded)
        spacing = np.spacing(np.abs(np.asarray(loaded, np.float32))).astype(np.float64) * 2**16
        displaced = np.abs(masters_of(loaded, state).astype(np.float64) - np.asarray(loaded, np.float64))
        assert (displaced <= spacing / 2).all()
        # And a fresh state has none.
        assert bits(masters_of(loaded, STEP["remainder"].init(loaded))) == bits(np.asarray(loaded, np.float32))


def numbers_with_a_bfloat16_nearby():
    """All upper halves, with lower halves around every decision: 0, ties, their neighbours."""
    low = np.array([0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF, 0x1234, 0xC321], np.uint32)
    return ((np.arange(65536, dtype=np.uint32) << 16)[:, None] | low).ravel().view(np.float32)


class TestRemainder:
    def test_weight_and_remainder_are_the_master(self):
        """Bit for bit: negative, subnormal, tied, infinite. NaN is the quiet one; past the last weight it saturates."""
        masters = numbers_with_a_bfloat16_nearby()
        weights, kept = jax.jit(lambda m: _split(m, jnp.dtype(jnp.bfloat16)))(masters)
        back = np.asarray(jax.jit(_join)(weights, kept))
        assert (weights.dtype, kept.dtype) == (jnp.bfloat16, jnp.int16)
        nan, end = np.isnan(masters), np.isfinite(masters) & (np.abs(masters) >= np.float32(3.3961775e38))
        usual = ~nan & ~end
        np.testing.assert_array_equal(back[usual].view(np.uint32), masters[usual].view(np.uint32))
        np.testing.assert_array_equal(
            np.asarray(weights)[usual].view(np.uint16), away_from_zero(masters[usual]).view("u2")
        )
        assert np.isnan(back[nan]).all()
        assert np.isnan(np.asarray(weights)[nan].astype(np.float32)).all()
        largest = np.array(0x7F7F7FFF, np.uint32).view(np.float32)
        np.testing.assert_array_equal(back[end], np.copysign(largest, masters[end]))
        assert np.isfinite(np.asarray(weights)[end].astype(np.float32)).all()

    def test_weights_are_nearest_but_for_ties(self):
        masters = numbers_with_a_bfloat16_nearby()
        usual = np.abs(masters) < 3.39e38
        tie = masters.view(np.uint32) & 0xFFFF == 0x8000
        weights = np.asarray(_split(masters, jnp.dtype(jnp.bfloat16))[0])
        with np.errstate(invalid="ignore"):
            cast = masters.astype(jnp.bfloat16)
        where = usual & ~tie
        np.testing.assert_array_equal(weights[where].view(np.uint16), cast[where].view(np.uint16))
        halfway = np.abs(weights[usual & tie].astype(np.float64) - masters[usual & tie])
        np.testing.assert_array_equal(halfway, np.abs(cast[usual & tie].astype(np.float64) - masters[usual & tie]))

    @given(st.floats(width=32))
    def test_any_number(self, x):
        weight, kept = _split(jnp.float32(x), jnp.dtype(jnp.bfloat16))
        back = np.asarray(_join(weight, kept))
        if abs(x) < 3.3961775e38 or np.isinf(x):
            assert bits(back) == bits(np.float32(x))
        assert bool(jnp.isfinite(weight)) == np.isfinite(x)

    def test_the_zeros_sign_is_the_masters(self):
        """No update makes -0.0 of a weight: the sign of a master that rounds to zero is among the 16 bits."""
        master = np.array([-1e-41, 1e-41, -0.0, 0.0], np.float32)
        weight, kept = _split(master, jnp.dtype(jnp.bfloat16))
        assert bits(_join(jnp.abs(weight), kept)) == bits(jnp.asarray(master))

    def test_four_bytes_a_weight(self):
        params = {"w": jnp.ones((8, 16), jnp.bfloat16)}
        state = T.master_weights(optax.sgd(0.1), form="remainder").init(params)
        assert sum(x.nbytes for x in jax.tree.leaves((params, state))) == 4 * 8 * 16

    @pytest.mark.parametrize("wrap", ["plain", "loss_scaled"])
    def test_a_thousand_adam_steps_are_those_of_float32_masters(self, wrap):
        """Scenario 33: bit for bit at each step, from weights of all sizes and both signs, tied masters on the way."""
        rng = np.random.default_rng(0)
        n = 512
        params = jnp.asarray(rng.normal(size=n) * 2.0 ** rng.integers(-126, 20, n), jnp.bfloat16)
        # Steps on a grid, so that many masters come to lie half-way between two weights.
        grid = optax.stateless(lambda updates, params: jnp.round(updates * 2.0**18) / 2.0**18)
        inner = optax.chain(optax.adam(1e-3), grid)
        txs = [T.master_weights(inner, form=form) for form in FORMS]
        if wrap == "loss_scaled":
            txs = [mp.loss_scaled(tx, mp.NoOpLossScale()) for tx in txs]
        state_of = lambda state: state.skip_state.inner_state if wrap == "loss_scaled" else state

        def step(carry, seed):
            grads = jax.random.normal(jax.random.fold_in(jax.random.key(0), seed), (n,))
            new = []
            for tx, (params, state) in zip(txs, carry, strict=True):
                updates, state = tx.update(grads, state, params)
                new.append((optax.apply_updates(params, updates), state))
            whole, joined = state_of(new[0][1]).masters, _join(new[1][0], state_of(new[1][1]).masters)
            as_bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32)
            tied = as_bits(whole) & 0xFFFF == 0x8000
            masters_alike = as_bits(whole) == as_bits(joined)
            weights_alike = new[0][0] == new[1][0]
            return new, (masters_alike.all(), (weights_alike | tied).all(), tied.sum(), (~weights_alike).sum())

        carry = [(params, tx.init(params)) for tx in txs]
        _, (masters, weights, ties, unlike) = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(1000)))(carry)
        assert masters.all()
        assert weights.all()
        assert ties.sum() > 100
        assert 0 < unlike.sum() < ties.sum()


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_state_can_be_donated(form):
    """What the inner transform keeps of the parameters it was shown is not the masters' own buffer."""
    keeps = optax.GradientTransformation(lambda params: params, lambda updates, state, params: (updates, state))
    params = jnp.ones(3, jnp.bfloat16)
    tx = T.master_weights(keeps, form=form)
    state = jax.jit(lambda s: tx.update(params, s, params)[1], donate_argnums=0)(tx.init(params))
    assert bits(state.inner_state) == bits(jnp.ones(3))
    assert params.sum() == 3


class TestErrors:
    @pytest.mark.parametrize("form", [None, "bfloat16", 16])
    def test_unknown_form(self, form):
        with pytest.raises(ValueError, match=f"form is {form!r}") as error:
            T.master_weights(optax.sgd(0.1), form=form)
        assert 'form="remainder"' in str(error.value)

    @pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2"])
    def test_remainders_are_bfloat16s_alone(self, dtype):
        params = {"a": jnp.ones(2, jnp.bfloat16), "b": {"w": jnp.ones(2, dtype)}}
        with pytest.raises(ValueError, match=f"it cannot store:\n    b/w: {dtype}\n") as error:
            T.master_weights(optax.sgd(0.1), form="remainder").init(params)
        assert 'form="float32"' in str(error.value)
        T.master_weights(optax.sgd(0.1)).init(params)
