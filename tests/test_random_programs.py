"""Autocast of random programs: no worse than a cast by hand, and nothing that fits in 16 bits overflows.

Each program runs in float64, with everything cast by hand to the compute dtype, and in float32 under autocast, on
the same three inputs. The equations are evaluated one by one: nothing but loops of Python, and operations that JAX
has compiled before, so that a hundred programs take a minute.
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_programs as programs
from jaxprs import MATRIX, dtypes

import mpjax as mp
from mpjax._compat import bind, inner_jaxprs, is_literal, name_scopes, open_jaxpr, scan_split

LOWS = ("bfloat16", "float16")
SAMPLES = 3


def evaluate(jaxpr, consts, args, see=lambda eqn, outs: None):
    """Evaluates a jaxpr one equation at a time, loops and branches in Python."""
    env = {}
    read = lambda atom: atom.val if is_literal(atom) else env[atom]
    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    inner = lambda jaxpr, args: evaluate(*open_jaxpr(jaxpr), args, see)
    for eqn in jaxpr.eqns:
        ins, params = [read(atom) for atom in eqn.invars], eqn.params
        match eqn.primitive.name:
            case "jit" | "remat2":
                outs = inner(params["jaxpr"], ins)
            case "custom_jvp_call" | "custom_vjp_call":
                outs = inner(params["call_jaxpr"], ins)
            case "cond":
                outs = inner(params["branches"][int(np.clip(ins[0], 0, len(params["branches"]) - 1))], ins[1:])
            case "while":
                n = params["cond_nconsts"]
                conditional, fixed, outs = (
                    ins[:n],
                    ins[n : n + params["body_nconsts"]],
                    ins[n + params["body_nconsts"] :],
                )
                while inner(params["cond_jaxpr"], [*conditional, *outs])[0]:
                    outs = inner(params["body_jaxpr"], [*fixed, *outs])
            case "scan":
                outs = scan(eqn, ins, inner)
            case _:
                outs = bind(eqn, [jnp.asarray(x, atom.aval.dtype) for x, atom in zip(ins, eqn.invars, strict=True)])
                see(eqn, outs)
        for var, out in zip(eqn.outvars, outs, strict=True):
            assert (var.aval.shape, var.aval.dtype) == (np.shape(out), out.dtype), eqn
            env[var] = out
    return [read(atom) for atom in jaxpr.outvars]


def scan(eqn, ins, inner):
    n_consts, n_carry = scan_split(eqn)
    consts, carry, xs = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]
    steps = range(eqn.params["length"])
    rows = []
    for i in reversed(steps) if eqn.params["reverse"] else steps:
        outs = inner(eqn.params["jaxpr"], [*consts, *carry, *(x[i] for x in xs)])
        carry = outs[:n_carry]
        rows.append(outs[n_carry:])
    rows = rows[::-1] if eqn.params["reverse"] else rows
    return [*carry, *(jnp.stack(column) for column in zip(*rows, strict=True))]


def inputs(seed):
    """Parameters and input, in float32 and of few enough digits to be the same in float64 and in 16 bits."""
    rng = np.random.default_rng(seed)
    draw = lambda scale, *shape: np.asarray(jnp.bfloat16(scale * rng.normal(size=shape)), np.float32)
    params = {
        "w": draw(0.4, 8, 8),
        "v": draw(0.4, 8, 8),
        "b": draw(0.5, 8),
        "scale": 1 + draw(0.2, 8),
        "k1": draw(0.3, 3, 8, 8),
        "k2": draw(0.3, 3, 3, 2, 2),
        "n": np.int32(3),
    }
    return params, draw(1.0, 4, 8)


def weights_of(out):
    """Of the output's elements in the loss that is differentiated: no digits that a cast would lose."""
    return (np.arange(out.size) % 5 - 1.75).reshape(out.shape).astype(np.float32)


def with_gradients(fn):
    """Outputs and the gradients of their weighted sum, with respect to floating parameters and the input."""

    def run(params, x):
        n = {"n": params["n"]}
        floating = {name: p for name, p in params.items() if name != "n"}

        def loss(floating, x):
            outs = fn({**floating, **n}, x)
            wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
            parts = [jnp.sum(o.astype(wide) * weights_of(o).astype(wide)) for o in outs.values()]
            return sum(parts[1:], parts[0]), outs

        grads, outs = jax.grad(loss, argnums=(0, 1), has_aux=True)(floating, x)
        return {"out": outs, "grad": grads}

    return run


def with_no_derivative(fn):
    """Outputs alone, where the other two have them."""
    return lambda params, x: {"out": fn(params, x)}


def with_tangents(fn):
    """Outputs and tangents, for what has no reverse mode."""

    def run(params, x):
        n = {"n": params["n"]}
        floating = {name: p for name, p in params.items() if name != "n"}
        primals, tangents = (floating, x), jax.tree.map(lambda x: 0.5 * jnp.cos(8 * x), (floating, x))
        outs, changes = jax.jvp(lambda p, x: fn({**p, **n}, x), primals, tangents)
        return {"out": outs, "grad": changes}

    return run


class Run:
    """A function on all samples, evaluated equation by equation or as JAX would.

    Attributes:
      values: of all samples, in float64, by path in the function's result.
      avals: what one result is made of, by path.
      jaxpr: the function's.
      largest_value: the largest value that the program itself makes; in float64 only.
      largest: the largest number in the jaxpr, masks aside; in float64 only.
    """

    def __init__(self, fn, dtype=jnp.float32, by_jax=False):
        samples = [programs.cast(jax.tree.map(jnp.asarray, inputs(seed)), dtype) for seed in range(SAMPLES)]
        self.largest_value = self.largest = 0.0
        self.jaxpr, consts = open_jaxpr(jax.make_jaxpr(lambda *args: jax.tree.leaves(fn(*args)))(*samples[0]))
        self.avals = flat(jax.eval_shape(fn, *samples[0]))
        if by_jax:
            runs = [jax.tree.leaves(fn(*args)) for args in samples]
        else:
            runs = [evaluate(self.jaxpr, consts, jax.tree.leaves(args), self._see) for args in samples]
        columns = zip(self.avals, zip(*runs, strict=True), strict=True)
        self.values = {path: np.stack([np.asarray(x, np.float64) for x in column]) for path, column in columns}

    def _see(self, eqn, outs):
        for x in outs:
            if x.dtype == jnp.float64 and x.size:
                top = float(jnp.abs(x).max())
                if eqn.primitive.name == "name":
                    self.largest_value = max(self.largest_value, top if np.isfinite(top) else np.inf)
                # Masks are not counted.
                if top < 1e8 or np.isnan(top):
                    self.largest = max(self.largest, top if np.isfinite(top) else np.inf)

    def stays_below(self, limit):
        return self.finite() and self.largest_value < limit

    def finite(self):
        return all(np.isfinite(v).all() for v in self.values.values())


def flat(tree):
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def matrix_dtypes(jaxpr, inside=False):
    """The dtypes of the operands of matrix work outside regions."""
    for eqn in jaxpr.eqns:
        here = inside or any(scope.startswith(("mpjax.full", "mpjax.keep")) for scope in name_scopes(eqn))
        if eqn.primitive.name in MATRIX and not here:
            yield from dtypes(eqn.invars[:2])
        for inner in inner_jaxprs(eqn):
            yield from matrix_dtypes(inner, here)


def check(program, derivative, by_jax=False):
    """Everything that autocast promises, for one program."""
    fn = lambda params, x: programs.outputs(program, params, x)
    own = {path: (x.shape, x.dtype) for path, x in flat(jax.eval_shape(derivative(fn), *inputs(0))).items()}
    with jax.enable_x64(True):
        # What is made outside of 16 bits' range may be lost in them.
        hypothesis.assume(Run(fn, jnp.float64).stays_below(1e3))
        true = Run(derivative(fn), jnp.float64)
    with np.errstate(over="ignore"):
        by_hand = {low: Run(derivative(fn), low) for low in LOWS}
    for low in LOWS:
        cast = mp.autocast(fn, f"mixed_{low}")
        alone = Run(with_no_derivative(cast), by_jax=by_jax)
        both = Run(jax.jit(derivative(cast)) if by_jax else derivative(cast), by_jax=by_jax)
        assert {path: (x.shape, x.dtype) for path, x in both.avals.items()} == own
        nested = {dtype for dtype in LOWS if f"autocast {dtype}" in programs.names(program)}
        assert {*matrix_dtypes(alone.jaxpr), *matrix_dtypes(both.jaxpr)} <= {low, *nested}
        hands = [by_hand[low], by_hand["bfloat16"]]
        compare(low, alone, true, hands)
        # A cotangent may be beyond float16 where no value is.
        compare(low, both, true, hands, "" if true.finite() and true.largest < 3e4 else "['out']")


def compare(low, got, true, hands, prefix=""):
    """No further from float64 than four times the cast by hand, or a few units in the last place."""
    for path, values in got.values.items():
        if not path.startswith(prefix):
            continue
        expected = true.values[path]
        assert np.isfinite(values).all(), f"{low}, {path} is not finite"
        # What is beyond float16 by hand is compared with bfloat16, which has its range but fewer digits.
        by_hand = [hand.values[path] for hand in hands if np.isfinite(hand.values[path]).all()]
        error, scale = np.linalg.norm(values - expected), np.linalg.norm(expected)
        usual = np.linalg.norm(by_hand[0] - expected) if by_hand else np.inf
        if usual < 0.3 * scale:
            slack = 2 * float(jnp.finfo(low).eps) * scale + 1e-6
            assert error <= 4 * usual + slack, f"{low}, {path}: {error / scale}, by hand {usual / scale}"


def settings(examples):
    # Not the phase that explains a failure: it runs hundreds of programs more.
    phases = [phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.explain]
    return hypothesis.settings(max_examples=examples, phases=phases, suppress_health_check=list(hypothesis.HealthCheck))


class TestShortSearch:
    @settings(3)
    @hypothesis.given(programs.programs(4, 1))
    def test_gradients(self, program):
        check(program, with_gradients)

    @settings(4)
    @hypothesis.given(programs.programs(4, 1, without=programs.REVERSE_ONLY))
    def test_tangents(self, program):
        check(program, with_tangents)

    @settings(2)
    @hypothesis.given(programs.programs(4, 1))
    def test_compiled(self, program):
        check(program, with_gradients, by_jax=True)


@pytest.mark.slow
class TestLongSearch:
    @settings(120)
    @hypothesis.given(programs.programs(7, 2))
    def test_gradients(self, program):
        check(program, with_gradients)

    @settings(30)
    @hypothesis.given(programs.programs(7, 2, without=programs.REVERSE_ONLY))
    def test_tangents(self, program):
        check(program, with_tangents)

    @settings(12)
    @hypothesis.given(programs.programs(5, 2))
    def test_compiled(self, program):
        check(program, with_gradients, by_jax=True)
