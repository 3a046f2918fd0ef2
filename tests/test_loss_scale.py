import math

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest
from helpers import LOSS_SCALES, run
from hypothesis import given, settings
from hypothesis import strategies as st

import mpjax as mp

SEQUENCE = "...X..XX.......X"

# Log2 of the scale after each step, from running the peers (research: torch 2.13, Keras 3.15; Apex's and
# Megatron's kernels re-implemented from source). Initial scale 2**16, period 3.
GOLDEN = {
    "torch, Keras 3, tf.keras, Apex amp": ({}, "16 16 17 16 16 16 15 14 14 14 15 15 15 16 16 15"),
    "Apex kernel, hysteresis 2": (
        {"hysteresis": 2, "hysteresis_refill": "clean"},
        "16 16 17 17 17 17 17 16 16 16 17 17 17 18 18 18",
    ),
    "Megatron, hysteresis 2": (
        {"hysteresis": 2, "hysteresis_refill": "growth"},
        "16 16 17 17 17 17 16 15 15 15 16 16 16 17 17 17",
    ),
}


@pytest.mark.parametrize("peer", GOLDEN)
def test_golden_vectors(peer):
    options, expected = GOLDEN[peer]
    history, _ = run(mp.DynamicLossScale(2.0**16, period=3, **options), SEQUENCE)
    assert history == [int(x) for x in expected.split()]


DEEPSPEED = {
    (1, False): "16 16 16 15 15 15 14 13 13 13 13 14 14 14 15 14",
    (2, False): "16 16 16 16 16 16 15 14 14 14 14 15 15 15 16 16",
    (2, True): "16 16 16 16 16 16 16 15 15 15 15 16 16 16 17 17",
}


@pytest.mark.parametrize(("hysteresis", "consecutive"), DEEPSPEED)
def test_deepspeed_differs_by_its_window_rule_alone(hysteresis, consecutive):
    """DeepSpeed grows at step N + 1 after an overflow, and then every N: its vectors are not ours.

    Its clean windows hold one step more. Given one clean step less after each overflow, ours has the same scales.
    """
    theirs = [int(x) for x in DEEPSPEED[hysteresis, consecutive].split()]
    ours, _ = run(
        mp.DynamicLossScale(
            2.0**16, period=3, hysteresis=hysteresis, hysteresis_refill="clean" if consecutive else "growth"
        ),
        SEQUENCE,
    )
    assert ours != theirs
    # One clean step dropped behind each run of overflows (and at the start, which DeepSpeed counts as one).
    starts = [0] + [i + 1 for i in range(15) if SEQUENCE[i] == "X" and SEQUENCE[i + 1] == "."]
    kept = [i for i in range(16) if i not in starts]
    shortened, _ = run(
        mp.DynamicLossScale(
            2.0**16, period=3, hysteresis=hysteresis, hysteresis_refill="clean" if consecutive else "growth"
        ),
        "".join(SEQUENCE[i] for i in kept),
    )
    assert shortened == [theirs[i] for i in kept]


@pytest.mark.parametrize(
    ("floor", "expected"),
    [(2.0**-14, [1, 0, -1, -2, -3]), (1.0, [1, 0, 0, 0, 0])],
    ids=["torch and Keras 3", "tf.keras and Megatron"],
)
def test_golden_floor(floor, expected):
    history, state = run(mp.DynamicLossScale(2.0**2, min_loss_scale=floor), "XXXXX")
    assert history == expected
    assert int(state.at_floor) == (3 if floor == 1 else 0)


def test_golden_ceiling():
    history, state = run(mp.DynamicLossScale(2.0**126, period=1), "...")
    assert history == [127, 127, 127]
    assert int(state.counter) == 0
    history, _ = run(mp.DynamicLossScale(2.0**16, period=1, max_loss_scale=2.0**17), "...X..")
    assert history == [17, 17, 17, 16, 17, 17]


def test_growth_is_refused_when_it_would_be_infinite():
    """Scenario 3 of torch and IPEX, at a power of two: factor 16 from 2**126."""
    _, state = run(mp.DynamicLossScale(2.0**126, period=1, factor=16), ".")
    assert float(state.loss_scale) == 2.0**126


def test_torch_update_scale_unit():
    """Scenario 2: growth 2, backoff .25, interval 2, scale 4."""
    state = mp.DynamicLossScale(4.0, period=2, backoff_factor=0.25)
    seen = []
    for finite in (True, True, False):
        state = state.adjust(finite)
        seen.append((int(state.counter), float(state.loss_scale)))
    assert seen == [(1, 4.0), (0, 8.0), (0, 2.0)]


@pytest.mark.parametrize("floor", [1.0, 0.25])
def test_overflows_only(floor):
    """Scenario 4 of DeepSpeed: 2**4 and eight overflows give max(s / 2, floor) each step."""
    state, expected = mp.DynamicLossScale(2.0**4, min_loss_scale=floor), 2.0**4
    for _ in range(8):
        state, expected = state.adjust(False), max(expected / 2, floor)
        assert float(state.loss_scale) == expected


def test_clean_steps_only():
    history, _ = run(mp.DynamicLossScale(2.0**8, period=2), "." * 10)
    assert history == [8, 9, 9, 10, 10, 11, 11, 12, 12, 13]


@pytest.mark.parametrize("initial", [1.0, 1024.0, 65536.0])
@pytest.mark.parametrize(("growth", "backoff"), [(2.0, 0.5), (4.0, 0.5), (2.0, 0.25), (4.0, 0.25)])
@pytest.mark.parametrize(("interval", "hysteresis"), [(10, 10), (100, 10), (10, 100), (100, 100)])
def test_apex_hysteresis_fuzz(initial, growth, backoff, interval, hysteresis):
    """Scenario 5 (Apex allows a growth factor of 1; it is refused here)."""
    start = mp.DynamicLossScale(
        initial,
        period=interval,
        factor=growth,
        backoff_factor=backoff,
        hysteresis=hysteresis,
        min_loss_scale=2.0**-100,
    )

    @jax.jit
    def history(finite):
        return jax.lax.scan(lambda s, _: (s.adjust(finite),) * 2, start, length=220)[1].loss_scale

    overflows, clean = np.asarray(history(False)), np.asarray(history(True))
    assert np.all(overflows[: hysteresis - 1] == initial)
    for k in (0, 1, 3):
        assert overflows[hysteresis + k - 1] == max(initial * backoff ** (k + 1), 2.0**-100)
    assert np.all(clean[: interval - 1] == initial)
    for m in (0, interval, interval + 1):
        assert clean[interval + m - 1] == initial * growth ** (1 + m // interval)


def test_a_longer_counter_than_the_period_still_grows():
    """Scenario 10: torch, Keras 3 and Megatron compare with == and never grow again."""
    loaded = mp.DynamicLossScale(2.0**4, counter=5, period=3)
    assert float(loaded.adjust(True).loss_scale) == 2.0**5
    assert int(loaded.adjust(True).counter) == 0


def reference(state, finite):
    """The rule of DESIGN section 4 in plain Python."""
    scale, counter, left, floor_hits = state["scale"], state["counter"], state["left"], state["at_floor"]
    o = state["options"]
    if finite:
        full = counter + 1 >= o["period"]
        if full and scale * o["factor"] <= o["ceiling"]:
            scale *= o["factor"]
        counter = 0 if full else counter + 1
        if o["refill"] == "clean" or full:
            left = o["hysteresis"]
    else:
        counter, left = 0, max(left - 1, 0)
        if left == 0:
            floor_hits += scale * o["backoff"] < o["floor"]
            scale = max(scale * o["backoff"], o["floor"])
    return {"scale": scale, "counter": counter, "left": left, "at_floor": floor_hits, "options": o}


@given(
    st.lists(st.booleans(), min_size=1, max_size=60),
    st.integers(1, 5),
    st.sampled_from([2.0, 4.0]),
    st.sampled_from([None, 0.5, 0.25]),
    st.integers(-5, 3),
    st.integers(4, 12),
    st.integers(1, 4),
    st.sampled_from(["clean", "growth"]),
)
@settings(max_examples=30)
def test_any_history_agrees_with_the_reference(history, period, factor, backoff, floor, ceiling, hysteresis, refill):
    state = mp.DynamicLossScale(
        2.0**4,
        period=period,
        factor=factor,
        min_loss_scale=2.0**floor,
        max_loss_scale=2.0**ceiling,
        backoff_factor=backoff,
        hysteresis=hysteresis,
        hysteresis_refill=refill,
    )
    expected = {
        "scale": 2.0**4,
        "counter": 0,
        "left": hysteresis,
        "at_floor": 0,
        "options": {
            "period": period,
            "factor": factor,
            "backoff": backoff or 1 / factor,
            "floor": 2.0**floor,
            "ceiling": 2.0**ceiling,
            "hysteresis": hysteresis,
            "refill": refill,
        },
    }

    def body(s, finite):
        s = s.adjust(finite)
        return s, (s.loss_scale, s.counter, s.hysteresis_left, s.at_floor)

    final, seen = jax.lax.scan(body, state, jnp.array(history))
    for i, finite in enumerate(history):
        expected = reference(expected, finite)
        found = [np.asarray(x)[i].item() for x in seen]
        assert found == [expected["scale"], expected["counter"], expected["left"], expected["at_floor"]]
    assert jax.tree.structure(final) == jax.tree.structure(state)


@given(st.integers(0, 2**32 - 1), st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1), st.booleans())
def test_any_loaded_bits_are_repaired(scale_bits, counter, left, finite):
    """Scenario 13 and every damaged checkpoint: whatever the leaves hold, the scale is usable and in bounds."""
    clean = mp.DynamicLossScale(2.0**10, period=3, min_loss_scale=0.5, max_loss_scale=2.0**20)
    loaded = jax.tree.unflatten(
        jax.tree.structure(clean),
        [np.uint32(scale_bits).view(np.float32), np.int32(counter), np.int32(left), np.int32(0)],
    )
    used = float(loaded.scale(jnp.float32(1.0)))
    after = loaded.adjust(finite)
    for value in (used, float(after.loss_scale)):
        assert 0.5 <= value <= 2.0**20
        assert math.frexp(value)[0] == 0.5
    assert float(loaded.unscale(jnp.float32(used))) == 1.0
    assert 0 <= int(after.counter) < 3
    assert 0 <= int(after.hysteresis_left) <= 1


@pytest.mark.parametrize("damaged", [np.inf, -np.inf, np.nan, 0.0, -4.0])
def test_a_scale_that_is_no_number_starts_again(damaged):
    state = mp.DynamicLossScale(2.0**9)
    loaded = state._replace(loss_scale=jnp.float32(damaged))
    assert float(loaded.scale(jnp.float32(1.0))) == 2.0**16
    assert float(loaded.adjust(True).loss_scale) == 2.0**16
    assert float(loaded.adjust(False).loss_scale) == 2.0**15
    bounded = mp.DynamicLossScale(2.0**4, max_loss_scale=2.0**8)._replace(loss_scale=jnp.float32(damaged))
    assert float(bounded.adjust(True).loss_scale) == 2.0**8


@given(st.floats(0.5, 2.0**20, width=32))
def test_a_scale_that_is_no_power_of_two_is_rounded_down(value):
    """jmp's and mpx's checkpoints may hold one (65504)."""
    loaded = mp.DynamicLossScale(1.0, min_loss_scale=0.5, max_loss_scale=2.0**20)._replace(loss_scale=np.float32(value))
    assert float(loaded.adjust(True).loss_scale) == 2.0 ** math.floor(math.log2(value))


def test_unscaling_at_both_ends_of_the_range():
    """1 / 2**127 is no normal float32: multiplying by it would give 0."""
    for scale in (2.0**127, 2.0**-126):
        state = mp.StaticLossScale(scale)
        assert state.unscale(jnp.float32(scale)) == 1.0
        assert state.unscale(state.scale(jnp.float32(1.5))) == 1.5


def test_counters_saturate():
    state = mp.DynamicLossScale(1.0, at_floor=2**31 - 1)
    assert int(state.adjust(False).at_floor) == 2**31 - 1


@pytest.mark.parametrize("name", LOSS_SCALES)
@given(exponent=st.integers(-20, 20), mantissa=st.floats(1, 2, exclude_max=True, width=32))
@settings(max_examples=20)
def test_unscale_inverts_scale_exactly(name, exponent, mantissa):
    state = LOSS_SCALES[name]
    x = np.ldexp(np.float32(mantissa), exponent)
    for value in (jnp.float32(x), jnp.complex64(x - 2j * x), jnp.array([x, -x], jnp.float32)):
        back = state.unscale(state.scale(value))
        assert back.dtype == value.dtype
        assert np.array_equal(back, value)


@pytest.mark.parametrize("name", ["static", "dynamic", "dynamic_all_options"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
def test_dtypes_of_scaling(name, dtype, x64):
    """Jmp unscales by promotion luck (J2), flax forces float32 (F6, F7): half becomes float32, wider stays."""
    state = LOSS_SCALES[name]
    scale = float(state.loss_scale)
    x = jnp.array([1.5], dtype)
    expected = "float32" if dtype in ("float16", "bfloat16") else dtype
    for fn, factor in ((state.scale, scale), (state.unscale, 1 / scale)):
        y = jax.jit(fn)(x)
        assert str(y.dtype) == expected
        assert y[0] == 1.5 * factor


@pytest.mark.parametrize("name", LOSS_SCALES)
def test_other_leaves_are_not_scaled(name):
    """Jmp raises on keys and float0 (J8d, e) and multiplies integers (J8c); jamp too."""
    state = LOSS_SCALES[name]
    tree = {
        "int": jnp.arange(3),
        "key": jax.random.key(0),
        "none": None,
        "float0": np.zeros(2, jax.dtypes.float0),
        "bool": jnp.array(True),
        "fp8": jnp.ones(2, jnp.float8_e5m2),
    }
    for fn in (state.scale, state.unscale):
        out = fn(tree)
        assert all(out[k] is tree[k] for k in tree)


def test_the_scale_is_never_cast_to_the_losss_dtype():
    """65536 is inf in float16: jmp and jamp (J12), flax's first step (F2), torch on 1-d losses."""
    state = mp.DynamicLossScale(2.0**16)
    for loss in (jnp.float16(3.0), jnp.array([3.0], jnp.float16)):
        scaled = state.scale(loss)
        assert scaled.dtype == jnp.float32
        assert np.all(np.asarray(scaled) == 3 * 2.0**16)


def test_scale_gradients():
    assert mp.scale_gradients([1.0, 2.0], 0.5) == [0.5, 1.0]
    assert mp.scale_gradients([1.0, [2]], 0.5) == [0.5, [2]]
    out = mp.scale_gradients({"h": jnp.float16(2.0), "f": jnp.ones(2), "i": jnp.arange(2)}, jnp.float32(3.0))
    assert out["h"] == 6.0
    assert out["h"].dtype == jnp.float32
    assert out["f"].tolist() == [3.0, 3.0]
    assert out["i"].tolist() == [0, 1]
    for four in (mp.StaticLossScale(4.0), jmp.StaticLossScale(4.0)):
        assert mp.scale_gradients([1.5], four) == [6.0]
    assert jax.jit(mp.scale_gradients)([1.0], 2.0)[0] == 2.0


@pytest.mark.parametrize("scale", [jnp.ones(2), True, "2", None, np.complex64(1j), 1j])
def test_scale_gradients_wants_one_number(scale):
    with pytest.raises(TypeError, match="one real number") as error:
        mp.scale_gradients([1.0], scale)
    assert "mp.scale_gradients(grads, 0.5)" in str(error.value)


def test_noop_and_static_have_no_leaves():
    assert jax.tree.leaves(mp.NoOpLossScale()) == []
    assert jax.tree.leaves(mp.StaticLossScale()) == []
    assert mp.StaticLossScale().loss_scale == 1024.0
    assert mp.NoOpLossScale().loss_scale == 1.0
    for state in (mp.NoOpLossScale(), mp.StaticLossScale(8)):
        assert state.adjust(jnp.array(False)) is state


def test_constants_are_compared_by_value():
    assert mp.StaticLossScale(8) == mp.StaticLossScale(8.0) != mp.StaticLossScale(4.0)
    assert mp.NoOpLossScale() == mp.NoOpLossScale()
    assert hash(mp.StaticLossScale(8)) == hash(mp.StaticLossScale(8.0))


def test_noop_is_the_identity_in_the_program():
    jaxpr = jax.make_jaxpr(lambda x: mp.NoOpLossScale().unscale(mp.NoOpLossScale().scale(x)))(jnp.ones(3))
    assert jaxpr.jaxpr.eqns == []


class TestConversionFromJmp:
    @pytest.mark.parametrize("scale", [2.0**15, jnp.asarray(2.0**15), jnp.float32(2.0**15), jmp.half_dtype()(2**15)])
    def test_dynamic(self, scale):
        theirs = jmp.DynamicLossScale(scale, np.int32(7), period=50, factor=4, min_loss_scale=np.float32(0.25))
        ours = mp._convert.as_loss_scale(theirs)
        assert isinstance(ours, mp.DynamicLossScale)
        assert (float(ours.loss_scale), int(ours.counter)) == (2.0**15, 7)
        assert (ours.period, ours.factor, ours.min_loss_scale, ours.backoff_factor) == (50, 4.0, 0.25, None)

    def test_static_and_noop(self):
        convert = mp._convert.as_loss_scale
        assert convert(jmp.StaticLossScale(jnp.float32(64.0))).loss_scale == 64.0
        assert isinstance(convert(jmp.NoOpLossScale()), mp.NoOpLossScale)
        own = mp.DynamicLossScale()
        assert convert(own) is own

    def test_jmps_constructor_names_work(self):
        state = mp.DynamicLossScale(
            loss_scale=jnp.asarray(2.0**15), counter=np.int32(1), period=10, factor=2, min_loss_scale=np.float32(0.5)
        )
        assert float(state.loss_scale) == 2.0**15
        assert mp.StaticLossScale(loss_scale=2.0**15).loss_scale == 2.0**15

    @given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 4))
    @settings(max_examples=20)
    def test_same_history_as_jmp(self, history, period):
        theirs = jmp.DynamicLossScale(jnp.float32(2.0**4), period=period)
        ours = mp._convert.as_loss_scale(theirs)
        for finite in history:
            with jax.numpy_dtype_promotion("standard"):  # jmp multiplies an int by a bool
                theirs = theirs.adjust(jnp.array(finite))
            ours = ours.adjust(finite)
            assert float(ours.loss_scale) == float(theirs.loss_scale)
            assert int(ours.counter) == int(theirs.counter)

    @pytest.mark.parametrize("other", [1024.0, None, "dynamic", jnp.float32(2.0), mp.LossScale()])
    def test_anything_else_is_an_error(self, other):
        with pytest.raises(TypeError, match="a loss scale") as error:
            mp.value_and_grad(lambda w: w, other)
        assert repr(other) in str(error.value)
        assert "mp.StaticLossScale(1024.0)" in str(error.value)


BAD = [
    *[
        ({"loss_scale": x}, ValueError, "positive, finite power of two")
        for x in (0, -2.0, math.nan, math.inf, -math.inf)
    ],
    ({"loss_scale": 1000.0}, ValueError, "mp.DynamicLossScale(loss_scale=2.0**10)"),
    ({"loss_scale": 2.0**-130, "min_loss_scale": 2.0**-126}, ValueError, "2.0**-126"),
    ({"loss_scale": jnp.ones(3)}, ValueError, "jax.vmap(mp.DynamicLossScale)(loss_scales)"),
    ({"loss_scale": 0.5}, ValueError, "outside [1.0"),
    ({"loss_scale": 2.0**10, "max_loss_scale": 2.0**9}, ValueError, "outside [1.0, 512.0]"),
    ({"min_loss_scale": 8.0, "max_loss_scale": 4.0}, ValueError, "min_loss_scale 8.0 is above max_loss_scale 4.0"),
    ({"min_loss_scale": 0.0}, ValueError, "min_loss_scale is 0.0"),
    ({"max_loss_scale": math.inf}, ValueError, "max_loss_scale is inf"),
    ({"period": 0}, ValueError, "period is 0"),
    ({"period": -1}, ValueError, "period is -1"),
    ({"period": 2.5}, TypeError, "period is 2.5"),
    ({"period": True}, TypeError, "period is True"),
    ({"factor": 1}, ValueError, "factor is 1.0"),
    ({"factor": 0.5}, ValueError, "factor is 0.5"),
    ({"factor": 1.5}, ValueError, "factor is 1.5, not a power of two"),
    ({"backoff_factor": 1.0}, ValueError, "backoff_factor is 1.0"),
    ({"backoff_factor": 2.0}, ValueError, "backoff_factor is 2.0"),
    ({"backoff_factor": 0.0}, ValueError, "backoff_factor is 0.0"),
    ({"hysteresis": 0}, ValueError, "hysteresis is 0"),
    ({"hysteresis_refill": "always"}, ValueError, "hysteresis_refill is 'always'"),
    *[({"loss_scale": x}, TypeError, f"loss_scale is {x!r}") for x in (None, 1j, "65536", True)],
    ({"loss_scale": 2**2000}, ValueError, "loss_scale is inf"),
    ({"factor": None}, TypeError, "factor is None"),
    ({"factor": 1.5}, ValueError, "factor=2.0**1)"),
    ({"period": 2**40}, ValueError, "from 1 to 2**31 - 1"),
    ({"counter": 0.5}, TypeError, "counter is 0.5"),
    ({"counter": -5}, ValueError, "counter is -5"),
    ({"counter": jnp.zeros(3, jnp.int32)}, TypeError, "int32 of shape ()"),
    ({"hysteresis_left": 1.0}, TypeError, "hysteresis_left is 1.0"),
    # flax's order (growth_factor, backoff_factor, growth_interval) is not jmp's and ours.
    ({"loss_scale": 2.0, "counter": 0.5, "period": 2000}, TypeError, "counter is 0.5"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_bad_configurations(options, error, words):
    with pytest.raises(error) as caught:
        mp.DynamicLossScale(**options)
    for word in (words, "expected:", "write:"):
        assert word in str(caught.value)


def test_inside_jit_the_shape_is_still_checked():
    with pytest.raises(ValueError, match="loss_scale has shape"):
        jax.jit(mp.DynamicLossScale)(jnp.ones(3))


def test_a_traced_scale_is_repaired_within_the_bounds():
    make = jax.jit(lambda s: mp.DynamicLossScale(s, max_loss_scale=2.0**8).adjust(True).loss_scale)
    assert [float(make(s)) for s in (-3.0, 2.0**10, 5.0)] == [2.0**8, 2.0**8, 4.0]


def test_two_initial_scales_are_one_type():
    first, second = mp.DynamicLossScale(2.0**10), mp.DynamicLossScale(2.0**12)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    reset = jax.jit(lambda flag, s: jax.lax.cond(flag, lambda s: mp.DynamicLossScale(2.0**10), lambda s: s, s))
    assert float(reset(True, second).loss_scale) == 2.0**10


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 1000.0])
def test_bad_static_scales(value):
    with pytest.raises(ValueError, match=r"mp\.StaticLossScale") as caught:
        mp.StaticLossScale(value)
    assert "loss_scale is" in str(caught.value)


@pytest.mark.parametrize("flag", [jnp.array([True]), jnp.array(1), 0.0, {"w": True}, None, "yes"])
@pytest.mark.parametrize("name", LOSS_SCALES)
def test_adjust_wants_one_boolean(flag, name):
    with pytest.raises(TypeError, match=r"grads_finite (has shape|is a)"):
        LOSS_SCALES[name].adjust(flag)
