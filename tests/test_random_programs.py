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
                conditional, fixed, outs = ins[:n], ins[n : n + params["body_nconsts"]], ins[n + params["body_nconsts"] :]
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
    """A function on all samples, evaluated equation by equation: {path: the samples' values}."""

    def __init__(self, fn, dtype=jnp.float32):
        samples = [programs.cast(jax.tree.map(jnp.asarray, inputs(seed)), dtype) for seed in range(SAMPLES)]
        self.jaxpr, consts = open_jaxpr(jax.make_jaxpr(lambda *args: jax.tree.leaves(fn(*args)))(*samples[0]))
        shapes = jax.eval_shape(fn, *samples[0])
        self.avals = jax.tree.leaves(shapes)
        self.structure = jax.tree.structure(shapes)
        self.largest_value = self.largest = 0.0
        runs = [evaluate(self.jaxpr, consts, jax.tree.leaves(args), self._see) for args in samples]
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
        self.values = {
            path: np.stack([np.asarray(x, np.float64) for x in column])
            for path, column in zip(paths, zip(*runs, strict=True), strict=True)
        }

    def _see(self, eqn, outs):
        for x in outs:
            if x.dtype == jnp.float64 and x.size:
                top = float(jnp.abs(x).max())
                if eqn.primitive.name == "name":
                    self.largest_value = max(self.largest_value, top if np.isfinite(top) else np.inf)
                # Masks are not counted.
                if top < 1e8 or np.isnan(top):
                    self.largest = max(self.largest, top if np.isfinite(top) else np.inf)

    def finite(self, prefix=""):
        return all(np.isfinite(v).all() for path, v in self.values.items() if path.startswith(prefix))


def distance(a, b):
    return float(np.linalg.norm(a - b))


def matrix_dtypes(jaxpr, inside=False):
    """The dtypes of the operands of matrix work outside regions."""
    for eqn in jaxpr.eqns:
        here = inside or any(scope.startswith(("mpjax.full", "mpjax.keep")) for scope in name_scopes(eqn))
        if eqn.primitive.name in MATRIX and not here:
            yield from dtypes(eqn.invars[:2])
        for inner in inner_jaxprs(eqn):
            yield from matrix_dtypes(inner, here)


def check(program, derivative):
    """Everything that autocast promises, for one program."""
    fn = lambda params, x: programs.outputs(program, params, x)
    own = jax.eval_shape(fn, *jax.tree.map(jnp.asarray, inputs(0)))
    with jax.enable_x64(True):
        forward = Run(fn, jnp.float64)
        hypothesis.assume(forward.finite() and forward.largest_value < 1e3)
        true = Run(derivative(fn), jnp.float64)
    differentiable = true.finite() and true.largest < 3e4
    with np.errstate(over="ignore"):
        by_hand = {low: Run(derivative(fn), low) for low in LOWS}
    for low in LOWS:
        cast = mp.autocast(fn, f"mixed_{low}")
        shape = jax.eval_shape(cast, *jax.tree.map(jnp.asarray, inputs(0)))
        assert jax.tree.structure(shape) == jax.tree.structure(own)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(shape)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(own)
        ]
        plain, both = Run(cast), Run(derivative(cast))
        lows = {low} | {dtype for dtype in LOWS if f"autocast {dtype}" in programs.names(program)}
        assert set(matrix_dtypes(plain.jaxpr)) | set(matrix_dtypes(both.jaxpr)) <= lows
        compare(low, {path.replace("", "['out']", 1): v for path, v in plain.values.items()}, true, by_hand)
        compare(low, {k: v for k, v in both.values.items() if differentiable or k.startswith("['out']")}, true, by_hand)
        assert all(aval.dtype == jnp.float32 for aval in both.avals)


def compare(low, got, true, by_hand):
    """No further from float64 than four times the cast by hand, or a few units in the last place."""
    for path, values in got.items():
        expected = true.values[path]
        assert np.isfinite(values).all(), (low, path, "not finite", values, expected)
        # What is beyond float16 by hand is compared with bfloat16, which has its range but fewer digits.
        hands = [by_hand[dtype].values[path] for dtype in (low, "bfloat16")]
        hand = next((h for h in hands if np.isfinite(h).all()), None)
        scale = distance(expected, 0)
        if hand is None or distance(hand, expected) > 0.3 * scale:
            continue
        slack = 2 * float(jnp.finfo(low).eps) * scale + 1e-6
        assert distance(values, expected) <= 4 * distance(hand, expected) + slack, (
            low,
            path,
            distance(values, expected) / scale,
            distance(hand, expected) / scale,
            values,
            hand,
            expected,
        )


QUICK = hypothesis.settings(max_examples=25)
# Without the phase that explains a failure, which runs hundreds of programs more.
LONG = hypothesis.settings(max_examples=300, suppress_health_check=list(hypothesis.HealthCheck))


@QUICK
@hypothesis.given(programs.programs(5, 1))
def test_random_programs(program):
    check(program, with_gradients)


@pytest.mark.slow
@LONG
@hypothesis.given(programs.programs(8, 2))
def test_many_random_programs(program):
    check(program, with_gradients)
