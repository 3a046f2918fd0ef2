"""Loss scales read from checkpoints: each goes on as its own library would, and no damage passes in silence."""

import functools
import math

import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from helpers import LOSS_SCALES, bits
from hypothesis import given, settings
from hypothesis import strategies as st

import mpjax as mp

STEPS = 400
FLAX = {"fin_steps": np.int32(7), "scale": np.float32(2.0**15)}
TORCH = {
    "scale": 2.0**15,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 50,
    "_growth_tracker": 7,
}
OURS = {
    "loss_scale": np.float32(2.0**15),
    "counter": np.int32(7),
    "hysteresis_left": np.int32(1),
    "at_floor": np.int32(3),
}


def by_orbax(state, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state")


def by_msgpack(state, path):
    return flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))


@jax.jit
def ours(state, finite):
    return jax.lax.scan(lambda s, ok: (s.adjust(ok), s.adjust(ok).loss_scale), state, finite)[1]


@jax.jit
def flaxs(state, finite):
    def step(state, ok):
        state = state.value_and_grad(lambda w: w * jnp.where(ok, 1.0, jnp.inf))(jnp.float32(1.0)).dynamic_scale
        return state, state.scale

    return jax.lax.scan(step, jax.tree.map(jnp.asarray, state), finite)[1]


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def jmps(state, finite, period, factor, floor):
    def step(carry, ok):
        # Made anew, since jmp's pytree forgets its floor.
        new = jmp.DynamicLossScale(*carry, period, factor, np.float32(floor)).adjust(ok)
        return (new.loss_scale, new.counter), new.loss_scale

    return jax.lax.scan(step, state, finite)[1]


def torchs(saved, finite):
    """torch._amp_update_scale_, as its documentation and kernel have it."""
    scale, tracker, history = np.float32(saved["scale"]), saved["_growth_tracker"], []
    for ok in finite:
        tracker = tracker + 1 if ok else 0
        if not ok:
            scale = np.float32(scale * saved["backoff_factor"])
        elif tracker == saved["growth_interval"]:
            grown = float(scale) * saved["growth_factor"]
            scale, tracker = np.float32(grown if grown < 2.0**128 else scale), 0
        history.append(scale)
    return np.array(history)


def flips(seed, rate):
    return np.random.default_rng(seed).random(STEPS) >= rate


def agree(mine, theirs, floor=2.0**-126):
    """The same scales, until the other's is one that no state of mpjax has: below the floor or no power of two."""
    mine, theirs = np.asarray(mine), np.asarray(theirs)
    outside = ~((theirs >= floor) & (np.frexp(theirs)[0] == 0.5) & np.isfinite(theirs))
    end = int(np.argmax(outside)) if outside.any() else len(theirs)
    assert end > 0
    np.testing.assert_array_equal(mine[:end], theirs[:end])


# The options are few, since each makes a program of its own; the states are many.
RUNS = {
    "exponent": st.integers(0, 30),
    "count": st.integers(0, 2),
    "seed": st.integers(0, 2**31),
    "rate": st.sampled_from([0.0, 0.02, 0.2, 0.5]),
}


@pytest.mark.standard_promotion  # jmp multiplies an int by a bool
class TestSameFuture:
    @given(**RUNS, options=st.sampled_from([(3, 2.0, 0.5, 2.0**-20), (5, 4.0, 0.25, 1.0), (3, 2.0, 0.25, None)]))
    @settings(max_examples=30)
    def test_flax(self, exponent, count, seed, rate, options):
        interval, growth, backoff, floor = options
        theirs = DynamicScale(growth, backoff, interval, count, 2.0**exponent, floor)
        expected = flaxs(theirs, flips(seed, rate))
        like = mp.DynamicLossScale(
            period=interval + 1, factor=growth, backoff_factor=backoff, min_loss_scale=floor or 2.0**-126
        )
        for saved in (theirs, {"fin_steps": np.asarray(count), "scale": np.float32(2.0**exponent)}):
            read = mp.read_loss_scale(saved, like)
            assert (read.period, read.factor, read.backoff_factor) == (interval + 1, growth, backoff)
            agree(ours(read, flips(seed, rate)), expected)

    @given(**RUNS, options=st.sampled_from([(3, 2, 2.0**-20), (5, 4, 1.0)]))
    @settings(max_examples=30)
    def test_jmp(self, exponent, count, seed, rate, options):
        arrays = jnp.float32(2.0**exponent), jnp.int32(count)
        theirs = jmp.DynamicLossScale(*arrays, *options[:2], np.float32(options[2]))
        expected = jmps(arrays, flips(seed, rate), *options)
        like = mp.DynamicLossScale(period=options[0], factor=options[1], min_loss_scale=options[2])
        saved = {"loss_scale": arrays[0], "counter": arrays[1]}
        # A live one brings its options, and the backing off that belongs to them.
        other = mp.DynamicLossScale(factor=2.0**6, backoff_factor=2.0**-5)
        for read in (mp.read_loss_scale(theirs, other), mp.read_loss_scale(saved, like)):
            assert np.array_equal(ours(read, flips(seed, rate)), expected)

    @given(**RUNS, options=st.sampled_from([(3, 2.0, 0.5), (5, 4.0, 0.25), (4, 4.0, 0.5)]))
    @settings(max_examples=30)
    def test_torch(self, exponent, count, seed, rate, options):
        interval, growth, backoff = options
        saved = {
            "scale": 2.0**exponent,
            "growth_factor": growth,
            "backoff_factor": backoff,
            "growth_interval": interval,
            "_growth_tracker": count,
        }
        read = mp.read_loss_scale(saved, mp.DynamicLossScale(min_loss_scale=2.0**-126))
        agree(ours(read, flips(seed, rate)), torchs(saved, flips(seed, rate)))

    @pytest.mark.parametrize("restore", [by_orbax, by_msgpack])
    @pytest.mark.parametrize("name", ["dynamic", "dynamic_all_options"])
    def test_mpjax(self, name, restore, tmp_path):
        state = LOSS_SCALES[name].adjust(True).adjust(False)
        like = LOSS_SCALES[name]
        assert bits(mp.read_loss_scale(restore(state, tmp_path), like)) == bits(state)
        assert bits(mp.read_loss_scale(state)) == bits(state)


class TestDifferences:
    """Where a scale of mpjax does not do what the saved one would have done, as the docstring says."""

    def test_flaxs_last_growth(self):
        theirs = DynamicScale(growth_interval=1, scale=2.0**127, fin_steps=1)
        assert np.array_equal(flaxs(theirs, np.ones(1, bool)), [np.finfo(np.float32).max])
        assert ours(mp.read_loss_scale(theirs), np.ones(1, bool)).tolist() == [2.0**127]

    def test_torchs_floor(self):
        saved = {**TORCH, "scale": 2.0}
        assert torchs(saved, [False] * 3).tolist() == [1.0, 0.5, 0.25]
        assert ours(mp.read_loss_scale(saved), np.zeros(3, bool)).tolist() == [1.0, 1.0, 1.0]

    def test_a_counter_past_the_period(self):
        saved = {**TORCH, "_growth_tracker": 60}
        assert torchs(saved, [True] * 99).max() == 2.0**15
        assert ours(mp.read_loss_scale(saved), np.ones(1, bool)).tolist() == [2.0**16]

    def test_flaxs_period_without_its_options(self):
        theirs, finite = DynamicScale(growth_interval=3), np.ones(8, bool)
        arrays = flax.serialization.to_state_dict(theirs)
        history = lambda period: np.log2(ours(mp.read_loss_scale(arrays, mp.DynamicLossScale(period=period)), finite))
        assert history(4).tolist() == np.log2(flaxs(theirs, finite)).tolist() == [16, 16, 16, 17, 17, 17, 17, 18]
        assert history(3).tolist() == [16, 16, 17, 17, 17, 18, 18, 18]


class TestWhereItIs:
    @pytest.mark.parametrize("saved", [FLAX, TORCH, OURS, {"loss_scale": 2.0**15, "counter": 7}])
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda x: x,
            lambda x: {"params": {"LayerNorm_0": {"scale": np.ones(3)}}, "loss_scale": x, "counter": np.int32(4)},
            lambda x: {"opt_state": [None, [{"count": np.int32(1)}, {"loss_scale": x, "skip_state": {}}]]},
            lambda x: (flax.core.freeze({"dynamic_scale": x}), optax.EmptyState()),
        ],
    )
    def test_in_a_tree(self, saved, wrap):
        read = mp.read_loss_scale(wrap(saved))
        assert (float(read.loss_scale), int(read.counter)) == (2.0**15, 7)
        assert (int(read.hysteresis_left), int(read.at_floor)) == (1, 3 if saved is OURS else 0)
        assert [str(x.dtype) for x in jax.tree.leaves(read)] == ["float32", "int32", "int32", "int32"]

    @pytest.mark.parametrize(
        "live",
        [
            mp.DynamicLossScale(2.0**15, 7),
            jmp.DynamicLossScale(jnp.float32(2.0**15), np.int32(7)),
            DynamicScale(scale=2.0**15, fin_steps=7),
        ],
    )
    def test_live_ones_in_a_tree(self, live):
        for tree in (live, {"loss_scale": live, "counter": 3}, [{"w": np.ones(2)}, (live,)]):
            read = mp.read_loss_scale(tree)
            assert (float(read.loss_scale), int(read.counter)) == (2.0**15, 7)

    @pytest.mark.parametrize("restore", [by_orbax, by_msgpack])
    def test_a_checkpoint_of_flaxs(self, restore, tmp_path):
        state = {"params": {"w": jnp.ones(2)}, "dynamic_scale": DynamicScale(scale=2.0**13).replace(fin_steps=5)}
        read = mp.read_loss_scale(restore(state, tmp_path), mp.DynamicLossScale(period=2001, hysteresis=2))
        assert (float(read.loss_scale), int(read.counter), int(read.hysteresis_left)) == (2.0**13, 5, 2)

    def test_an_optimizer_starts_from_it(self, tmp_path):
        tx = mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale(period=3))
        state = tx.init(jnp.ones(2))
        for value in (1.0, jnp.inf, 1.0):
            _, state = tx.update(jnp.full(2, value), state, jnp.ones(2))
        read = mp.read_loss_scale(by_orbax(state, tmp_path), mp.DynamicLossScale(period=3))
        assert bits(read) == bits(state.loss_scale)
        assert bits(mp.loss_scaled(optax.adam(0.1), read).init(jnp.ones(2)).loss_scale) == bits(read)

    @pytest.mark.parametrize("live", [mp.NoOpLossScale(), mp.StaticLossScale(8.0), jmp.NoOpLossScale()])
    def test_those_without_arrays(self, live):
        assert mp.read_loss_scale({"loss_scale": live}) == mp._convert.as_loss_scale(live)
        assert mp.read_loss_scale(jmp.StaticLossScale(jnp.float32(8.0))) == mp.StaticLossScale(8.0)


def without(saved, name):
    return {key: value for key, value in saved.items() if key != name}


INCOMPLETE = [
    # What is not there.
    ({}, ValueError, ["what was saved is empty", "mp.DynamicLossScale(), which starts again"]),
    (None, ValueError, ["what was saved is empty"]),
    ({"opt_state": {"mu": np.ones(2)}}, ValueError, ["has 0 loss scales, but\n    opt_state/mu", "fin_steps"]),
    ({"scale": 2.0**15}, ValueError, ["has 0 loss scales, but\n    scale"]),
    ({"a": FLAX, "b": [TORCH]}, ValueError, ["has 2 loss scales:\n    a\n    b/0", "saved[...]"]),
    (without(OURS, "loss_scale"), ValueError, ["has no loss_scale; it has at_floor, counter, hysteresis_left."]),
    ({"s": without(OURS, "counter")}, ValueError, ["has no s/counter; it has"]),
    ({"s": {**OURS, "loss_scale": None}}, ValueError, ["has no s/loss_scale"]),
    (without(OURS, "at_floor"), ValueError, ["has no at_floor"]),
    (without(FLAX, "scale"), ValueError, ["has no scale; it has fin_steps.", "all of scale, fin_steps"]),
    (without(TORCH, "scale"), ValueError, ["has no scale; it has _growth_tracker, backoff_factor"]),
    # What is no number.
    ({**OURS, "loss_scale": "65536"}, TypeError, ["loss_scale is a str", "one number"]),
    ({**OURS, "loss_scale": [1.0]}, TypeError, ["loss_scale is a list"]),
    ({**OURS, "loss_scale": True}, TypeError, ["loss_scale is a bool"]),
    ({**OURS, "loss_scale": np.array("1")}, TypeError, ["loss_scale has dtype <U1"]),
    ({**OURS, "loss_scale": np.complex64(1)}, TypeError, ["loss_scale has dtype complex64"]),
    ({**OURS, "loss_scale": jax.ShapeDtypeStruct((), jnp.float32)}, TypeError, ["loss_scale is a ShapeDtypeStruct"]),
    ({"s": {**OURS, "loss_scale": np.ones((2, 3))}}, ValueError, ["s/loss_scale has shape (2, 3)", "lambda x: x[0]"]),
    ({**FLAX, "fin_steps": np.float32(3)}, TypeError, ["fin_steps is 3.0", "a whole number"]),
    ({**OURS, "counter": np.zeros(1, np.int32)}, ValueError, ["counter has shape (1,)"]),
    ({**TORCH, "growth_interval": None}, TypeError, ["growth_interval is a NoneType"]),
    # Options that were saved.
    ({**TORCH, "growth_interval": 0}, ValueError, ["growth_interval is 0", "from 1 to"]),
    ({"s": {**TORCH, "growth_factor": 1.5}}, ValueError, ["s/growth_factor is 1.5", "DynamicLossScale(factor=...)"]),
    ({**TORCH, "backoff_factor": math.nan}, ValueError, ["backoff_factor is nan", "a power of two"]),
    ({**TORCH, "backoff_factor": 2.0}, ValueError, ["backoff_factor is 2.0", "below 1"]),
    (DynamicScale(growth_factor=1.5), ValueError, ["growth_factor is 1.5"]),
    ({**OURS, "hysteresis_refill": object()}, ValueError, ["hysteresis_refill is ''"]),
]
OUT_OF_RANGE = [
    ({**OURS, "loss_scale": np.float32(np.nan)}, ValueError, ["loss_scale is nan", "power of two", "repair=True"]),
    ({"s": [{**FLAX, "scale": math.inf}]}, ValueError, ["s/0/scale is inf", "which takes 2.0**16"]),
    ({**TORCH, "scale": 10**400}, ValueError, ["scale is inf"]),
    ({**OURS, "loss_scale": jnp.bfloat16(-4)}, ValueError, ["loss_scale is -4.0"]),
    ({**OURS, "loss_scale": 0}, ValueError, ["loss_scale is 0.0"]),
    ({**FLAX, "scale": 98304.0}, ValueError, ["scale is 98304.0, not", "2.0**16 or 2.0**17", "takes 2.0**16"]),
    ({**FLAX, "scale": 2.0**-5}, ValueError, ["outside [1.0", "like=mp.DynamicLossScale(min_loss_scale=2.0**-5)"]),
    ({**OURS, "counter": np.int32(-1)}, ValueError, ["counter is -1", "from 0 to 2**31 - 1", "repair=True"]),
    ({**TORCH, "_growth_tracker": 2**31}, ValueError, ["_growth_tracker is 2147483648"]),
    ({**OURS, "at_floor": np.int64(-(2**40))}, ValueError, ["at_floor is -1099511627776"]),
]


class TestDamage:
    @pytest.mark.parametrize(("saved", "error", "words"), INCOMPLETE + OUT_OF_RANGE)
    def test_it_is_said(self, saved, error, words):
        with pytest.raises(error) as caught:
            mp.read_loss_scale(saved)
        for word in [*words, "expected:", "write:"]:
            assert word in str(caught.value)

    @pytest.mark.parametrize(("saved", "error", "words"), INCOMPLETE)
    def test_what_is_missing_or_no_number_is_not_repaired(self, saved, error, words):
        with pytest.raises(error) as caught:
            mp.read_loss_scale(saved, repair=True)
        assert words[0] in str(caught.value)

    @pytest.mark.parametrize("saved", [saved for saved, _, _ in OUT_OF_RANGE])
    def test_numbers_are_repaired_when_asked_to(self, saved):
        read = mp.read_loss_scale(saved, repair=True)
        assert math.log2(read.loss_scale).is_integer()
        assert 1.0 <= read.loss_scale <= 2.0**127
        assert min(read.counter, read.hysteresis_left, read.at_floor) >= 0

    def test_the_scale_above_the_ceiling(self):
        with pytest.raises(ValueError, match=r"max_loss_scale=2\.0\*\*15"):
            mp.read_loss_scale(TORCH, mp.DynamicLossScale(8.0, max_loss_scale=16.0))

    def test_inside_jit(self):
        with pytest.raises(TypeError, match="loss_scale is a tracer"):
            jax.jit(lambda x: mp.read_loss_scale({**OURS, "loss_scale": x}).loss_scale)(1.0)

    @pytest.mark.parametrize("like", [mp.NoOpLossScale(), mp.StaticLossScale(2.0), {"period": 3}, 2.0**15])
    def test_like(self, like):
        with pytest.raises(TypeError, match=r"(?s)like is a .* a DynamicLossScale"):
            mp.read_loss_scale(OURS, like=like)

    @given(st.integers(0, 2**32 - 1), *[st.integers(-(2**31), 2**31 - 1)] * 3, st.booleans())
    def test_repair_is_that_of_the_state(self, scale, counter, left, at_floor, finite):
        """The repair is what DynamicLossScale does with such numbers anyway, in the scale and in the next step."""
        like = mp.DynamicLossScale(2.0**10, period=3, min_loss_scale=0.5, max_loss_scale=2.0**20)
        numbers = np.uint32(scale).view(np.float32), *np.array([counter, left, max(at_floor, 0)], np.int32)
        damaged = jax.tree.unflatten(jax.tree.structure(like), numbers)
        read = mp.read_loss_scale(dict(zip(OURS, numbers, strict=True)), like, repair=True)
        assert read.loss_scale == damaged._factor()
        assert bits(read.adjust(finite)) == bits(damaged.adjust(finite))

    @pytest.mark.parametrize(
        ("scale", "expected"),
        [(98304.0, 2.0**16), (65504.0, 2.0**15), (1e300, 2.0**16), (math.nan, 2.0**16), (0.1, 1.0)],
    )
    def test_repaired_scales(self, scale, expected):
        read = mp.read_loss_scale({"scale": scale, "fin_steps": -5}, repair=True)
        assert (float(read.loss_scale), int(read.counter)) == (expected, 0)

    def test_what_is_sound_is_not_changed_by_a_repair(self):
        assert bits(mp.read_loss_scale(OURS, repair=True)) == bits(mp.read_loss_scale(OURS))


def test_the_state_of_a_live_nnx_optimizer():
    """Each of its arrays is a variable."""
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, mp.loss_scaled(optax.sgd(0.1), mp.DynamicLossScale(2.0**7)), wrt=nnx.Param)
    found = mp.read_loss_scale(optimizer.opt_state)
    assert isinstance(found.loss_scale, jax.Array)
    assert float(found.loss_scale) == 2.0**7
