import dataclasses
import pickle
import re
import subprocess
import sys

import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import mpjax as mp
from mpjax import _dtypes
from mpjax._policy_grammar import PRESETS

DTYPES = list(_dtypes._SPELLINGS)
WIDE = [name for name in DTYPES if not name.startswith("float8")]
SPELLINGS = [(name, s) for name in WIDE for s in (name, *_dtypes._SPELLINGS[name], jnp.dtype(name), getattr(jnp, name))]


@st.composite
def policies(draw):
    dtypes = draw(st.lists(st.sampled_from(WIDE), min_size=4, max_size=4))
    dtypes[1] = draw(st.sampled_from(DTYPES))
    patterns = st.text("abc.*/|()norm,={}\"'\\d", max_size=8).filter(_is_regex)
    plain = st.sampled_from([*WIDE, "mixed_bfloat16", "c=f16"])
    return mp.Policy(*dtypes).with_overrides(draw(st.dictionaries(patterns, plain, max_size=3)))


def _is_regex(text):
    try:
        re.compile(text)
    except re.error:
        return False
    return True


@given(policies())
def test_str_round_trips(policy):
    again = mp.get_policy(str(policy))
    assert again == policy
    assert hash(again) == hash(policy)
    assert str(again) == str(policy)


@given(st.tuples(*[st.sampled_from(SPELLINGS)] * 3), st.tuples(*[st.sampled_from(SPELLINGS)] * 3))
def test_equal_policies_have_equal_hashes(a, b):
    """jmp: Policy(jnp.float32, ...) == Policy(jnp.dtype('float32'), ...) with different hashes (J11f, g)."""
    first, second = mp.Policy(*[s for _, s in a]), mp.Policy(*[s for _, s in b])
    assert (first == second) == ([n for n, _ in a] == [n for n, _ in b])
    if first == second:
        assert hash(first) == hash(second)


def test_two_spellings_share_one_jit_cache_entry(count_traces):
    fn = count_traces(lambda x, policy: policy.cast_to_compute(x))
    jitted = jax.jit(fn, static_argnums=1)
    for half in (jnp.float16, "f16", np.float16, jnp.dtype("float16")):
        jitted(jnp.ones(2), mp.Policy("f32", half, "f32"))
    assert fn.traces == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # jmp's defaults: params float32, compute follows params, output follows compute.
        ("c=f16", ("float32", "float16", "float16")),
        ("p=f16", ("float16", "float16", "float16")),
        ("p=f16,c=bf16", ("float16", "bfloat16", "bfloat16")),
        ("o=f16", ("float32", "float32", "float16")),
        ("params=float32,compute=bfloat16,output=float32", ("float32", "bfloat16", "float32")),
        ("full", ("float32", "float32", "float32")),
        ("bf16", ("bfloat16", "bfloat16", "bfloat16")),
        # jmp raises on a space (J11d), on capitals, and on the "f" that its own message promises.
        (" Params = Float32 , COMPUTE = BF16 ,output=F32 ", ("float32", "bfloat16", "float32")),
        ("f", ("float32", "float32", "float32")),
        ("p=f32,c=f16,", ("float32", "float16", "float16")),
        ("float32", ("float32",) * 3),
        ("bfloat16", ("bfloat16",) * 3),
        ("float16", ("float16",) * 3),
        ("mixed_bfloat16", ("float32", "bfloat16", "float32")),
        ("Mixed_Float16", ("float32", "float16", "float32")),
        ("mixed_float8", ("float32", "float8_e4m3fn", "float32")),
        ("c=e5m2,o=f32", ("float32", "float8_e5m2", "float32")),
    ],
)
def test_grammar(text, expected):
    policy = mp.get_policy(text)
    assert tuple(str(d) for d in (policy.param_dtype, policy.compute_dtype, policy.output_dtype)) == expected
    assert policy.reduce_dtype == jnp.float32


@pytest.mark.parametrize("text", ["c=f16", "p=f16", "p=f16,c=bf16,o=f32", "full", "o=bf16", "f64"])
def test_grammar_agrees_with_jmp(text):
    theirs = jmp.get_policy(text)
    assert mp.get_policy(text) == mp.get_policy(theirs)


def test_overrides_in_a_string_are_as_forgiving_as_the_rest():
    expected = mp.get_policy("mixed_bfloat16").with_overrides({"a": "float32"})
    for text in ('mixed_bfloat16, overrides = {"a": "F32"}', 'p=f32,c=bf16,o=f32,Overrides={"a":"full"}'):
        assert mp.get_policy(text) == expected
    assert mp.get_policy('overrides={"a": "f16"}') == mp.get_policy("f32").with_overrides({"a": "f16"})


def test_half_is_this_machines():
    assert mp.get_policy("p=full,c=half").compute_dtype == mp.half_dtype()
    assert mp.get_policy("half").param_dtype == mp.half_dtype()


def test_reduce_dtype():
    policy = mp.get_policy("mixed_bfloat16")
    assert str(mp.get_policy("c=bf16,reduce=bf16").reduce_dtype) == "bfloat16"
    assert dataclasses.replace(policy, reduce_dtype="bf16") != policy


def test_repr_evaluates_to_the_policy():
    policy = mp.get_policy("mixed_bfloat16").with_overrides({r".*\d": "float32"})
    import mpjax

    assert eval(repr(policy), {"mpjax": mpjax}) == policy


def test_a_policy_is_frozen_and_pickles():
    policy = mp.get_policy("mixed_float16").with_overrides({"a": "float32"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.param_dtype = jnp.float16
    assert pickle.loads(pickle.dumps(policy)) == policy


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in ("param", "compute", "output") for name in WIDE] + [("compute", "e4m3")]
)
def test_casts_touch_floats_only(name, kind, x64):
    policy = mp.Policy(*["float32"] * 3)
    policy = dataclasses.replace(policy, **{f"{kind}_dtype": name})
    key = jax.random.key(0)
    floats = {d: jnp.ones(2, d) for d in ("float16", "bfloat16", "float32", "float64")}
    others = [
        jnp.arange(2),
        jnp.array([True]),
        key,
        None,
        jnp.ones(1, jnp.float8_e4m3fn),
        jnp.ones(1, jnp.complex64),
        1.5,
    ]
    cast, kept = getattr(policy, f"cast_to_{kind}")((floats, others))
    # An 8-bit compute dtype is for the operands of matmuls, each with a scale; a tree is cast to bfloat16.
    expected = "bfloat16" if name == "e4m3" else name
    assert {str(x.dtype) for x in cast.values()} == {expected}
    assert all(a is b for a, b in zip(kept, others, strict=True))


def test_casts_trace_and_differentiate():
    policy = mp.get_policy("mixed_bfloat16")
    grads = jax.jit(jax.grad(lambda w: policy.cast_to_output(policy.cast_to_compute(w) ** 2).sum()))(jnp.ones(3))
    assert grads.dtype == jnp.float32


def test_it_is_a_jmp_policy():
    policy = mp.get_policy("mixed_float16")
    assert isinstance(policy, jmp.Policy)
    assert str(policy.with_output_dtype(jnp.float16).output_dtype) == "float16"
    assert isinstance(policy.with_output_dtype(jnp.float16), mp.Policy)
    assert mp.get_policy(jmp.Policy(jnp.float32, jnp.float16, jnp.float32)) == policy
    assert mp.get_policy(policy) is policy


def test_haiku_takes_it():
    class Net(hk.Module):
        def __call__(self, x):
            inner = hk.Linear(2)(x)
            seen.append(inner.dtype)
            return inner

    seen = []
    hk.mixed_precision.set_policy(Net, mp.get_policy("mixed_bfloat16"))
    try:
        net = hk.without_apply_rng(hk.transform(lambda x: Net()(x)))
        params = net.init(jax.random.key(0), jnp.ones((1, 3)))
        out = net.apply(params, jnp.ones((1, 3)))
    finally:
        hk.mixed_precision.clear_policy(Net)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert seen[-1] == jnp.bfloat16
    assert out.dtype == jnp.float32


class TestOverrides:
    policy = mp.get_policy("mixed_bfloat16").with_overrides({r".*(norm|bn).*": "float32"})

    def dtypes(self, policy, tree):
        cast = policy.cast_to_compute(tree)
        leaves = jax.tree_util.tree_leaves_with_path(cast)
        return {mp._tree.path_name(p): str(x.dtype) for p, x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}

    def test_linen(self):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.LayerNorm()(nn.Dense(2)(x))
                return nn.BatchNorm(use_running_average=False)(x)

        variables = Net().init(jax.random.key(0), jnp.ones((2, 2)))
        assert self.dtypes(self.policy, variables) == {
            "params/Dense_0/bias": "bfloat16",
            "params/Dense_0/kernel": "bfloat16",
            "params/LayerNorm_0/bias": "float32",
            "params/LayerNorm_0/scale": "float32",
            "params/BatchNorm_0/bias": "float32",
            "params/BatchNorm_0/scale": "float32",
            "batch_stats/BatchNorm_0/mean": "float32",
            "batch_stats/BatchNorm_0/var": "float32",
        }

    def test_nnx(self):
        class Net(nnx.Module):
            def __init__(self, rngs):
                self.linear = nnx.Linear(2, 2, rngs=rngs)
                self.bn = nnx.BatchNorm(2, rngs=rngs)
                self.dropout = nnx.Dropout(0.5, rngs=rngs)

        state = nnx.state(Net(nnx.Rngs(0)))
        found = self.dtypes(self.policy, state)
        assert found["linear/kernel"] == "bfloat16"
        assert found["bn/scale"] == found["bn/mean"] == found["bn/var"] == "float32"
        assert isinstance(self.policy.cast_to_compute(state), nnx.State)

    def test_tuples_and_dataclasses(self):
        tree = ({"norm": jnp.ones(1)}, [jnp.ones(1)])
        assert self.dtypes(self.policy, tree) == {"0/norm": "float32", "1/0": "bfloat16"}

    def test_param_and_compute_follow_the_override_and_output_does_not(self):
        policy = mp.get_policy("float16").with_overrides({".*norm": "p=float32,c=bfloat16,o=float16"})
        tree = {"norm": jnp.ones(1), "w": jnp.ones(1)}
        assert str(policy.cast_to_param(tree)["norm"].dtype) == "float32"
        assert str(policy.cast_to_compute(tree)["norm"].dtype) == "bfloat16"
        assert {str(x.dtype) for x in policy.cast_to_output(tree).values()} == {"float16"}

    @pytest.mark.parametrize("value", ["float32", jnp.float32, np.dtype("float32"), mp.get_policy("float32"), "full"])
    def test_values_are_policies_or_dtypes(self, value):
        assert mp.get_policy("mixed_bfloat16").with_overrides({r".*(norm|bn).*": value}) == self.policy

    def test_two_rules_that_disagree_are_named(self):
        policy = mp.get_policy("mixed_bfloat16").with_overrides({".*norm.*": "float32", ".*scale": "float16"})
        with pytest.raises(ValueError, match="2 overrides match 'norm/scale' and disagree") as error:
            policy.cast_to_compute({"norm": {"scale": jnp.ones(1)}})
        assert "'.*norm.*': params=float32" in str(error.value)
        assert "'.*scale': params=float16" in str(error.value)

    def test_two_rules_that_agree_are_fine(self):
        policy = mp.get_policy("mixed_bfloat16").with_overrides({".*norm.*": "float32", ".*scale": "f32"})
        assert self.dtypes(policy, {"norm": {"scale": jnp.ones(1)}}) == {"norm/scale": "float32"}

    @pytest.mark.parametrize("cast", ["cast_to_param", "cast_to_compute"])
    def test_a_rule_that_matches_nothing_is_reported(self, cast):
        policy = self.policy.with_overrides({"norm": "float32", ".*kernel": "float32"})
        with pytest.warns(UserWarning, match="overrides that match no path: 'norm'") as record:
            getattr(policy, cast)({"LayerNorm": {"scale": jnp.ones(1)}, "d": {"kernel": jnp.ones(1)}})
        assert "LayerNorm/scale" in str(record[0].message)
        assert record[0].filename == __file__

    def test_a_rule_that_matches_nothing_in_a_tuple_is_reported(self):
        policy = self.policy.with_overrides({"7": "float32"})
        with pytest.warns(UserWarning, match="match no path: '7'"):
            policy.cast_to_compute((jnp.ones(1), jnp.ones(1)))

    def test_bare_arrays_have_no_path_to_report(self):
        assert self.policy.cast_to_compute(jnp.ones(1)).dtype == jnp.bfloat16
        assert self.policy.cast_to_compute({"step": jnp.array(1)})["step"] == 1

    def test_order_does_not_matter(self):
        a = self.policy.with_overrides({"a": "f32", "b": "f16"})
        b = self.policy.with_overrides({"b": "f16", "a": "f32"})
        assert a == b
        assert hash(a) == hash(b)

    def test_bad_patterns(self):
        with pytest.raises(ValueError, match=r"override '\(norm' is not a regular expression"):
            self.policy.with_overrides({"(norm": "float32"})
        with pytest.raises(ValueError, match="has overrides of its own"):
            self.policy.with_overrides({"norm": self.policy})
        with pytest.raises(TypeError, match="'int32' is not a floating dtype"):
            self.policy.with_overrides({"norm": jnp.int32})
        with pytest.raises(ValueError, match="unknown override None"):
            self.policy.with_overrides({"norm": None})
        for pattern in (5, re.compile("norm")):
            with pytest.raises(TypeError, match="a regular expression as a string"):
                self.policy.with_overrides({pattern: "float32"})
        with pytest.raises(TypeError, match="a mapping from patterns"):
            self.policy.with_overrides([("norm", "float32")])

    def test_the_constructor_takes_what_with_overrides_takes(self):
        for overrides in ({r".*(norm|bn).*": "float32"}, ((r".*(norm|bn).*", "float32"),)):
            assert mp.Policy("f32", "bf16", "f32", overrides=overrides) == self.policy

    def test_a_parameter_called_value(self):
        @jax.tree_util.register_dataclass
        @dataclasses.dataclass
        class Attention:
            query: jax.Array
            value: jax.Array

        policy = self.policy.with_overrides({r".*/value": "float32"})
        cast = policy.cast_to_compute({"attn": Attention(jnp.ones(1), jnp.ones(1))})["attn"]
        assert (str(cast.query.dtype), str(cast.value.dtype)) == ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("params/LayerNorm_0/scale", True),
        ("encoder/layers_3/norm1/bias", True),
        ("transformer/ln_f/scale", True),
        ("h/0/ln_1/weight", True),
        ("stem/bn/scale", True),
        ("layer1/0/bn2/bias", True),
        ("RMSNorm_0/scale", True),
        ("batch_stats/BatchNorm_0/mean", True),
        ("features/running_var", True),
        ("net/moving_variance", True),
        ("_overwrite_with_gradient/Dense_0/kernel_amax_history", True),
        ("moe/router/kernel", True),
        ("lm_head/kernel", True),
        ("head/bias", True),
        ("classifier/kernel", True),
        ("logits/kernel", True),
        ("visual/ln_pre/scale", True),
        ("block/bn_conv1/gamma", True),
        ("layer_normalization_3/gamma", True),
        ("norm_out/scale", True),
        ("moe/router_weights", True),
        ("to_logits/kernel", True),
        ("classification_head/kernel", True),
        ("params/Dense_0/kernel", False),
        ("normal_head/kernel", False),
        ("denormalize/kernel", False),
        ("normalizer_mlp/kernel", False),
        ("multi_head/kernel", False),
        ("attention/multi_head/kernel", False),
        ("attention/heads/kernel", False),
        ("mlp/gate/kernel", False),
        ("embed/embedding", False),
        ("subnet/kernel", False),
        ("conv_init/kernel", False),
    ],
)
@pytest.mark.filterwarnings("ignore:overrides that match no path")
def test_default_overrides(path, kept):
    policy = mp.get_policy("mixed_bfloat16").with_overrides(mp.default_overrides())
    assert (policy.cast_to_compute({path: jnp.ones(1)})[path].dtype == jnp.float32) == kept


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: mp.get_policy("mixed_bfloat61"), ValueError, [*PRESETS, *DTYPES, "'mixed_bfloat61'"]),
        (lambda: mp.get_policy(""), ValueError, ["unknown policy ''"]),
        (lambda: mp.get_policy("c=f61"), ValueError, ["unknown compute_dtype 'f61'", *DTYPES]),
        (lambda: mp.get_policy("c="), ValueError, ["unknown compute_dtype ''"]),
        (lambda: mp.get_policy("x=f32"), ValueError, ["unknown key 'x' in policy 'x=f32'", "params, compute"]),
        (lambda: mp.get_policy("c=f32,compute=f16"), ValueError, ["second value for 'compute'"]),
        (lambda: mp.get_policy("c=f32,overrides=[1]"), ValueError, ["is not a JSON object"]),
        (lambda: mp.get_policy("c=f32,overrides={"), ValueError, ["is not a JSON object"]),
        (lambda: mp.get_policy('overrides={"a": 1}'), ValueError, ["is not a JSON object"]),
        (lambda: mp.get_policy(16), TypeError, ["policy is 16, a int", "a string or a policy"]),
        (lambda: mp.get_policy("int32"), TypeError, ["'int32' is not a floating dtype"]),
        (lambda: mp.Policy(jnp.int8, jnp.float32, jnp.float32), TypeError, ["param_dtype 'int8'"]),
        (lambda: mp.Policy("f32", jnp.complex64, "f32"), TypeError, ["compute_dtype 'complex64'"]),
        (lambda: mp.Policy("f32", "f32", jnp.bool_), TypeError, ["output_dtype 'bool'"]),
        (lambda: mp.Policy(None, None, None), ValueError, ["unknown param_dtype None"]),
        (lambda: mp.Policy("e4m3", "e4m3", "f32"), ValueError, ["param_dtype is float8_e4m3fn", "mixed_float8"]),
        (lambda: mp.get_policy("float8_e4m3fn"), ValueError, ["param_dtype is float8_e4m3fn", "mixed_float8"]),
        (lambda: mp.get_policy("c=e5m2"), ValueError, ["output_dtype is float8_e5m2"]),
        (lambda: mp.get_policy("c=f16,r=e5m2"), ValueError, ["reduce_dtype is float8_e5m2"]),
    ],
)
def test_bad_policies(make, error, words):
    with pytest.raises(error) as caught:
        make()
    for word in [*words, "expected:", "write:"]:
        assert word in str(caught.value)


def test_cast_helpers():
    tree = {"w": jnp.ones(2, jnp.float16), "i": jnp.arange(2)}
    assert mp.cast_to_full(tree)["w"].dtype == jnp.float32
    assert mp.cast_to_half(mp.cast_to_full(tree))["w"].dtype == mp.half_dtype()
    assert mp.cast_to_half(tree)["i"] is tree["i"]


def test_override_strings_are_data_and_never_code():
    """A policy string is parsed as JSON and regular expressions: nothing in it runs."""
    code = 'import mpjax as mp; mp.get_policy(\'overrides={"a": "__import__(os)"}\')'
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "unknown policy '__import__(os)'" in done.stderr


def test_cast_to_reduce():
    """What collectives are given: floats alone, whatever the overrides."""
    policy = mp.get_policy("params=float32,compute=bfloat16,output=float32,reduce=bfloat16")
    grads = {"norm": jnp.ones(2), "step": jnp.array(3), "low": jnp.ones(2, jnp.float16), "none": None}
    cast = policy.with_overrides({".*norm.*": "float32"}).cast_to_reduce(grads)
    assert (str(cast["norm"].dtype), str(cast["low"].dtype)) == ("bfloat16", "bfloat16")
    assert cast["step"] is grads["step"]
    assert str(mp.get_policy("mixed_bfloat16").cast_to_reduce(grads)["low"].dtype) == "float32"
