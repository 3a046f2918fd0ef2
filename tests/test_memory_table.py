"""memory_table against the arrays' own bytes, against XLA's, and against what is known by hand."""

import io
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
import rich.console

import mpjax as mp
from mpjax.diagnostics import MemoryRow, memory_table

pytestmark = pytest.mark.standard_promotion

N = 64
PARAMS = {"a": jnp.ones((N, N)), "b": {"w": jnp.ones((N, N)), "bias": jnp.ones(N)}}
COUNT = 2 * N * N + N
ADAMW = optax.adamw(1e-3)

OPTIMIZERS = {
    "adamw": ADAMW,
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "lion": optax.lion(1e-3),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=N),
    "amsgrad": optax.amsgrad(1e-3),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "schedule free": optax.contrib.schedule_free_adamw(1e-3),
    "muon": optax.contrib.muon(1e-3),
    "MultiSteps": optax.MultiSteps(ADAMW, 2),
    "masked": optax.masked(ADAMW, {"a": True, "b": {"w": False, "bias": False}}),
    "groups": optax.multi_transform({"x": ADAMW, "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}),
    "loss_scaled": mp.loss_scaled(optax.chain(optax.clip_by_global_norm(1.0), ADAMW), mp.DynamicLossScale()),
}


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def rows(found, choice=""):
    """Bytes a parameter by kind and name."""
    return {
        (row.kind, row.name) if row.name else row.kind: row.bytes / found.parameters
        for row in found.rows
        if row.choice == choice
    }


def compiled(tx, policy, params):
    """XLA's figures for a training step with its arguments donated, and the bytes of its batch."""
    loss_fn = mp.autocast(lambda p, x: jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"]["w"] + p["b"]["bias"]) ** 2), policy)

    def step(params, state, x):
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    x = jax.ShapeDtypeStruct((2, N), jnp.float32)
    state = jax.eval_shape(tx.init, params)
    lowered = jax.jit(step, donate_argnums=(0, 1), keep_unused=True).lower(params, state, x)
    outputs = len(jax.tree.leaves((params, state))) + 1
    return lowered.compile().memory_analysis(), 2 * N * 4, outputs


class TestAgainstArrays:
    @pytest.mark.parametrize("policy", [None, "float32", "mixed_bfloat16", "bfloat16", "float16"])
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_state_and_weights(self, name, policy):
        found = memory_table(PARAMS, OPTIMIZERS[name], policy)
        params = mp.get_policy(policy).cast_to_param(PARAMS) if policy else PARAMS
        assert found.parameters == COUNT
        assert found.kept == {"": nbytes(params) + nbytes(OPTIMIZERS[name].init(params))}
        kinds = rows(found)
        assert kinds["weights"] * COUNT == nbytes(params)
        assert kinds["gradients"] * COUNT == nbytes(jax.grad(lambda p: optax.tree.norm(p))(params))
        copies = nbytes(mp.get_policy(policy).cast_to_compute(params)) if policy == "mixed_bfloat16" else 0
        assert kinds.get("compute copy", 0.0) * COUNT == copies
        assert found.in_a_step[""] - found.kept[""] == nbytes(params) + copies

    def test_leaves_of_every_sort(self):
        params = {"w": jnp.ones(3, jnp.bfloat16), "n": jnp.arange(5), "k": jax.random.key(0), "f": jnp.tanh, "o": None}
        found = memory_table(params, mp.loss_scaled(optax.adam(1e-3), mp.NoOpLossScale()), "float32")
        assert found.parameters == 3
        weights = next(row for row in found.rows if row.kind == "weights")
        assert weights.bytes == 3 * 4 + 5 * 4 + jax.random.key_data(params["k"]).nbytes
        assert next(row.bytes for row in found.rows if row.kind == "gradients") == 12
        assert rows(found)["moments", "nu"] == 4

    def test_a_module(self):
        class Net(eqx.Module):
            linear: eqx.nn.Linear
            v: jax.Array

        net = Net(eqx.nn.Linear(4, 4, key=jax.random.key(0)), jnp.ones(4))
        found = memory_table(net, optax.contrib.schedule_free_adamw(1e-3))
        assert found.parameters == 24
        assert rows(found)["other", "z"] == rows(found)["moments", "nu"] == 4

    def test_none_and_empty(self):
        assert rows(memory_table(PARAMS)) == {"weights": 4, "gradients": 4}
        empty = memory_table({}, ADAMW)
        assert (empty.parameters, rows(memory_table(PARAMS, optax.sgd(0.1)))) == (0, {"weights": 4, "gradients": 4})
        assert "counters" in str(empty)


class TestAgainstXla:
    @pytest.mark.parametrize("name", ["adamw", "momentum", "lion", "adafactor", "amsgrad", "loss_scaled"])
    @pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16"])
    def test_arguments_and_results(self, name, policy):
        """What is kept is what the step takes and gives, but for its batch, its loss and a pointer for each array."""
        tx = OPTIMIZERS[name]
        if policy == "bfloat16" and name != "loss_scaled":
            tx = mp.loss_scaled(tx, mp.NoOpLossScale())
        found = memory_table(PARAMS, tx, policy)
        params = mp.get_policy(policy).cast_to_param(PARAMS)
        memory, batch, outputs = compiled(tx, policy, params)
        kept = found.kept[""]
        assert memory.argument_size_in_bytes == kept + batch
        assert memory.output_size_in_bytes == kept + 4 + 8 * outputs
        assert memory.alias_size_in_bytes == kept

    @pytest.mark.parametrize(
        "wrap",
        [
            mp.transforms.master_weights,
            lambda tx: mp.transforms.master_weights(tx, form="remainder"),
            mp.transforms.kahan,
            lambda tx: mp.transforms.stochastic_rounding(tx, jax.random.key(0)),
            lambda tx: mp.transforms.params_ema(mp.transforms.master_weights(tx), 0.99),
            lambda tx: mp.transforms.state_dtypes(tx, {"mu": "float8_e4m3fn", "nu": "bfloat16"}),
        ],
        ids=["masters", "remainder", "kahan", "stochastic", "EMA of masters", "8-bit moments"],
    )
    def test_weights_and_moments_in_half_precision(self, wrap):
        tx = mp.loss_scaled(wrap(ADAMW), mp.DynamicLossScale())
        found = memory_table(PARAMS, tx, "bfloat16")
        memory, batch, _ = compiled(tx, "bfloat16", jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS))
        assert memory.argument_size_in_bytes == found.kept[""] + batch
        assert memory.alias_size_in_bytes == found.kept[""]

    @pytest.mark.parametrize("name", ["adamw", "momentum", "lion", "sgd", "amsgrad"])
    def test_gradients_are_what_a_float32_step_needs_beside_it(self, name):
        """But for the activations of a small batch; XLA writes some gradients to where a result will be."""
        found = memory_table(PARAMS, OPTIMIZERS[name], "float32")
        memory, batch, _ = compiled(OPTIMIZERS[name], "float32", PARAMS)
        beside = found.in_a_step[""] - found.kept[""]
        assert memory.temp_size_in_bytes <= beside + 8 * batch
        if name in ("adamw", "momentum"):
            assert memory.temp_size_in_bytes >= beside


class TestKinds:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("adamw", {("moments", "mu"): 4, ("moments", "nu"): 4}),
            ("momentum", {("moments", "trace"): 4}),
            ("amsgrad", {("moments", "mu"): 4, ("moments", "nu"): 4, ("moments", "nu_max"): 4}),
            ("MultiSteps", {("moments", "mu"): 4, ("moments", "nu"): 4, "accumulator": 4}),
            ("schedule free", {("moments", "nu"): 4, ("other", "z"): 4}),
            ("loss_scaled", {("moments", "mu"): 4, ("moments", "nu"): 4}),
            ("injected", {("moments", "mu"): 4, ("moments", "nu"): 4}),
        ],
    )
    def test_of_optax_states(self, name, expected):
        found = rows(memory_table(PARAMS, OPTIMIZERS[name]))
        for kind in ("weights", "gradients", "counters"):
            found.pop(kind, None)
        assert found == expected

    def test_by_type_of_state(self):
        """optax.ema averages updates: a moment."""
        found = rows(memory_table(PARAMS, optax.ema(0.9)))
        assert found["moments", "ema"] == 4

    def test_a_parameter_named_like_a_moment(self):
        params = {"mu": jnp.ones(4), "count": jnp.ones(4)}
        found = rows(memory_table(params, optax.chain(optax.adam(1e-3), optax.contrib.schedule_free_adamw(1e-3))))
        assert found["other", "z"] == 4
        assert found["moments", "mu"] == 4
        assert found["moments", "nu"] == 8

    def test_what_has_no_kind_keeps_its_fields_name(self):
        found = memory_table(PARAMS, optax.contrib.muon(1e-3))
        assert ("other", "ns_coeffs") in rows(found)
        assert rows(memory_table(PARAMS, optax.lbfgs()))["other", "diff_params_memory"] == 40

    def test_counters_are_scalars_integers_and_keys(self):
        state = {"a": jnp.zeros((), jnp.int32), "k": jax.random.key(0), "x": jnp.ones(()), "n": jnp.arange(3)}
        tx = optax.GradientTransformation(lambda params: state, lambda u, s, p=None: (u, s))
        (counters,) = [row for row in memory_table(PARAMS, tx).rows if row.kind == "counters"]
        assert counters.bytes == 4 + 8 + 4 + 12

    def test_of_mpjaxs_states(self):
        t, key = mp.transforms, jax.random.key(0)
        wrapped = {
            "masters": (t.master_weights, {"masters": 4}),
            "remainder": (lambda tx: t.master_weights(tx, form="remainder"), {"masters": 2}),
            "kahan": (t.kahan, {"compensation": 2}),
            "stochastic": (lambda tx: t.stochastic_rounding(tx, key), {}),
            "EMA": (lambda tx: t.params_ema(tx, 0.99), {"EMA": 6}),
            "both": (lambda tx: t.params_ema(t.kahan(tx), 0.99), {"compensation": 2, "EMA": 6}),
            "bf16 moments": (lambda tx: t.state_dtypes(tx, {"mu|nu": "bfloat16"}), {}),
            "8-bit moments": (lambda tx: t.state_dtypes(tx, {"mu|nu": "float8_e4m3fn"}), {}),
        }
        choices = {name: mp.loss_scaled(wrap(ADAMW), mp.DynamicLossScale()) for name, (wrap, _) in wrapped.items()}
        found = memory_table(PARAMS, choices, "bfloat16")
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
        for name, (_, expected) in wrapped.items():
            kinds = rows(found, name)
            assert {kind: kinds[kind] for kind in ("masters", "compensation", "EMA") if kind in kinds} == expected
            moments = kinds["moments", "mu"], kinds["moments", "nu"]
            assert moments == {
                "bf16 moments": (2, 2),
                "8-bit moments": (1, 1),
            }.get(name, (4, 4))
            assert found.kept[name] == nbytes(params) + nbytes(choices[name].init(params))
        assert rows(found, "8-bit moments")["moments", "scales"] == pytest.approx(2 * 4 / N, rel=0.02)
        each = {name: round(found.kept[name] / COUNT) for name in wrapped}
        assert each == {
            "masters": 14,
            "remainder": 12,
            "kahan": 12,
            "stochastic": 10,
            "EMA": 16,
            "both": 18,
            "bf16 moments": 6,
            "8-bit moments": 4,
        }


class TestArithmetic:
    """4N + 2N: what mixed precision saves, and what it does not."""

    choices = {
        "float32": (ADAMW, "float32"),
        "mixed": (ADAMW, "mixed_bfloat16"),
        "fp8": (ADAMW, "mixed_float8"),
        "pure, state in float32": (mp.loss_scaled(ADAMW, mp.NoOpLossScale()), "bfloat16"),
        "pure": (ADAMW, "bfloat16"),
    }

    def test_bytes_a_parameter(self):
        found = memory_table(PARAMS, self.choices)
        each = {name: (found.kept[name] / COUNT, found.in_a_step[name] / COUNT) for name in self.choices}
        expected = {
            "float32": (12, 16),
            "mixed": (12, 18),
            "fp8": (12, 18),
            "pure, state in float32": (10, 12),
            "pure": (6, 8),
        }
        assert each == {name: pytest.approx(numbers, abs=0.01) for name, numbers in expected.items()}

    def test_overrides(self):
        policy = mp.get_policy("bfloat16").with_overrides({".*bias": "float32", ".*w": "params=float32,compute=f16"})
        found = memory_table(PARAMS, None, policy)
        sizes = {row.kind: (row.bytes, row.dtypes) for row in found.rows}
        assert sizes["weights"] == (2 * N * N + 4 * N * N + 4 * N, ("bfloat16", "float32"))
        assert sizes["compute copy"] == (2 * N * N, ("float16",))

    def test_one_policy_for_all_that_have_none(self):
        found = memory_table(PARAMS, {"a": ADAMW, "b": (ADAMW, "float32"), "c": (None, None)}, "bfloat16")
        assert [rows(found, c)["weights"] for c in "abc"] == [2, 4, 4]

    def test_nothing_is_allocated(self):
        """2 TB of parameters."""
        params = {"w": jax.ShapeDtypeStruct((10**6, 5 * 10**5), jnp.float32)}
        found = memory_table(params, self.choices)
        assert found.kept["float32"] == 12 * 5 * 10**11 + 4

    def test_no_array_is_computed(self):
        """Parameters that are arrays are neither read nor cast."""
        params = jax.tree.map(jnp.copy, PARAMS)
        jax.tree.map(lambda x: x.delete(), params)
        assert memory_table(params, self.choices) == memory_table(PARAMS, self.choices)


class TestShown:
    choices = {"float32": (ADAMW, "float32"), "mixed": (ADAMW, "mixed_bfloat16"), "plain": optax.sgd(0.1)}

    def test_text(self):
        lines = str(memory_table(PARAMS, self.choices)).splitlines()
        assert lines == [
            "8,256 parameters",
            "",
            "  bytes a parameter   float32         mixed            plain",
            "  weights               4.00 float32    4.00 float32     4.00 float32",
            "  moments: mu           4.00 float32    4.00 float32",
            "  moments: nu           4.00 float32    4.00 float32",
            "  counters              0.00 int32      0.00 int32",
            "  kept between steps   12.00           12.00             4.00",
            "  gradients             4.00 float32    4.00 float32     4.00 float32",
            "  compute copy                          2.00 bfloat16",
            "  in a step            16.00           18.00             8.00",
            "                         132 kB          149 kB            66 kB",
            "",
            "Not counted: activations. They are what a 16-bit compute dtype halves.",
        ]

    @pytest.mark.parametrize(("shape", "text"), [((5,), "20 B"), ((10**6, 10), "40 MB"), ((10**6, 10**4), "40 GB")])
    def test_sizes(self, shape, text):
        found = memory_table({"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)})
        assert text in str(found)

    def test_rich_shows_the_same_cells(self):
        found = memory_table(PARAMS, self.choices)
        console = rich.console.Console(file=io.StringIO(), width=200)
        console.print(found)
        shown = console.file.getvalue()
        for text in ("8,256 parameters", "moments: nu", "2.00 bfloat16", "18.00", "149 kB", "Not counted: activations"):
            assert text in shown

    def test_json(self):
        found = memory_table(PARAMS, self.choices)
        data = json.loads(found.to_json())
        assert [MemoryRow(**{**row, "dtypes": tuple(row["dtypes"])}) for row in data["rows"]] == list(found.rows)
        assert (data["parameters"], data["kept"], data["in_a_step"]) == (COUNT, found.kept, found.in_a_step)


class TestBadInput:
    @pytest.mark.parametrize("tx", [0.1, optax.adamw, "adamw", (optax.sgd(0.1), "float32", 3)])
    def test_no_transform(self, tx):
        with pytest.raises(TypeError, match=r"tx is .*\n.*an optax transform, or a mapping"):
            memory_table(PARAMS, tx)
        with pytest.raises(TypeError, match="under 'mine'"):
            memory_table(PARAMS, {"fine": ADAMW, "mine": tx})

    def test_unknown_policy(self):
        with pytest.raises(ValueError, match="policy"):
            memory_table(PARAMS, ADAMW, "bfloat61")
