"""Random JAX programs: plain data that a search can shrink and print, and what they compute.

A program is a tuple of steps. A step is a name of `UNARY`, `BINARY`, `WEIGHTED` or `NESTED`, how far back among the
values made so far its operands are, and for `NESTED` a program that it runs inside a loop, a branch or a transform.
"""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import mpjax as mp

# The largest value that stays inside a program.
LARGEST_SIZE = 128
ROWS = np.array([2, 0, 2, 1], np.int32)
AWKWARD = (1e-8, 1e9, -1e9, 3.0, -0.5)


def fit(x, shape):
    """Brings a value of any shape to another: broadcast if that can be, else repeated and cut."""
    size = int(np.prod(shape))
    if x.shape == shape:
        return x
    if x.ndim <= len(shape) and all(a in (1, b) for a, b in zip(x.shape[::-1], shape[::-1], strict=False)):
        return jnp.broadcast_to(x, shape)
    flat = x.reshape(-1)
    flat = jnp.concatenate([flat] * -(-size // flat.size)) if flat.size < size else flat
    return flat[:size].reshape(shape)


def matrix(x):
    return x if x.ndim > 1 and x.shape[-1] == 8 else fit(x, (4, 8))


def masked(x, value):
    """Masks an upper triangle, the whole first row in it if that leaves anything to compute with."""
    rows, columns = matrix(x).shape[-2:]
    return jnp.where(jnp.tri(rows, columns, -1 if np.isfinite(value) else 0, dtype=bool), matrix(x), value)


def layer_norm(x, eps=1e-6):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)


def attention(q, k, mask):
    scores = jnp.einsum("...ik,...jk->...ij", q, k) / 8**0.5
    scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, mask)
    return jax.nn.softmax(scores) @ k


def conv(x, kernel, stride=1):
    """One or two dimensions, by the kernel."""
    image = x.reshape(1, -1, 8) if kernel.ndim == 3 else fit(x, (1, 4, 4, 2))
    letters = "NHC"[: kernel.ndim] if kernel.ndim == 3 else "NHWC"
    kernels = "HIO" if kernel.ndim == 3 else "HWIO"
    return lax.conv_general_dilated(
        image, kernel, (stride,) * (kernel.ndim - 2), "SAME", dimension_numbers=(letters, kernels, letters)
    )[0]


def window(x, start, fn):
    return lax.reduce_window(matrix(x), np.asarray(start, x.dtype)[()], fn, (1, 3), (1, 2), "SAME")


UNARY = {
    **{f.__name__: f for f in (jnp.tanh, jnp.sin, jnp.negative, jnp.square, jnp.cumsum)},
    **{f.__name__: f for f in (jax.nn.gelu, jax.nn.silu, jax.nn.relu, jax.nn.sigmoid, jax.nn.softplus, jax.nn.elu)},
    **{f"add {c}": lambda x, c=c: x + c for c in (1e-8, 3.0, -0.5)},
    **{f"mul {c}": lambda x, c=c: x * c for c in (1e-8, 200.0, -0.5)},
    **{f"max {c}": lambda x, c=c: jnp.maximum(x, c) for c in AWKWARD},
    **{f"min {c}": lambda x, c=c: jnp.minimum(x, c) for c in AWKWARD},
    "one minus": lambda x: 1.0 - x,
    "there and back": lambda x: x * 1e-8 * 1e8,
    "exp of bounded": lambda x: jnp.exp(3 * jnp.tanh(x)),
    "exp of negative": lambda x: jnp.exp(-jnp.abs(x)),
    "log1p of abs": lambda x: jnp.log1p(jnp.abs(x)),
    "sqrt of square": lambda x: jnp.sqrt(jax.nn.relu(x) ** 2 + 1e-8),
    "cube": lambda x: 0.1 * x**3,
    "soft sign": lambda x: x / (1 + jnp.abs(x)),
    "clip": lambda x: jnp.clip(x, -1e9, 1e9),
    **{f"{f.__name__} of rows": lambda x, f=f: f(matrix(x), -1) for f in (jnp.sum, jnp.mean, jnp.max, jnp.var)},
    **{f"{f.__name__} of columns": lambda x, f=f: f(matrix(x), 0, keepdims=True) for f in (jnp.sum, jnp.mean, jnp.min)},
    **{f"{f.__name__} of all": lambda x, f=f: f(x) for f in (jnp.mean, jnp.sum, jnp.max)},
    "logsumexp": lambda x: jax.nn.logsumexp(matrix(x), -1, keepdims=True),
    "softmax": lambda x: jax.nn.softmax(matrix(x)),
    "log_softmax": lambda x: jax.nn.log_softmax(matrix(x)),
    **{f"softmax masked by {c}": lambda x, c=c: jax.nn.softmax(masked(x, c)) for c in (-1e9, -3.4e38, -np.inf)},
    "softmax of biased": lambda x: jax.nn.softmax(matrix(x) + np.where(np.arange(8) < 5, 0, -1e9).astype(x.dtype)),
    "largest of masked": lambda x: jnp.maximum(masked(x, -1e9).max(-1), -8.0),
    "logsumexp of masked": lambda x: jnp.maximum(jax.nn.logsumexp(masked(x, -1e9), -1), -8.0),
    "layer_norm": lambda x: layer_norm(matrix(x)),
    "rms_norm": lambda x: x * lax.rsqrt(jnp.mean(x**2, keepdims=True) + 1e-6),
    "unit norm": lambda x: matrix(x) / (jnp.linalg.norm(matrix(x), axis=-1, keepdims=True) + 1e-8),
    "standardized": lambda x: jax.nn.standardize(matrix(x), axis=0),
    "rsqrt of variance": lambda x: lax.rsqrt(jnp.var(x) + 0.1),
    "transpose": lambda x: x.T,
    "flat": lambda x: x.reshape(-1),
    "broadcast": lambda x: jnp.broadcast_to(x, (2, *x.shape)),
    "evens": lambda x: matrix(x)[..., ::2],
    "evens times odds": lambda x: matrix(x)[..., ::2] * matrix(x)[..., 1::2],
    "rotated": lambda x: jnp.concatenate([-matrix(x)[..., 4:], matrix(x)[..., :4]], -1),
    "middle": lambda x: matrix(x)[1:3],
    "padded": lambda x: jnp.pad(matrix(x), [(1, 0)] * (matrix(x).ndim - 1) + [(0, 0)]),
    "differences": lambda x: jnp.diff(matrix(x), axis=-1),
    "flipped": lambda x: jnp.flip(x),
    "gather": lambda x: matrix(x)[ROWS],
    "set": lambda x: matrix(x).at[0].set(0.5),
    "segment_sum": lambda x: jax.ops.segment_sum(fit(x, (4, 8)), ROWS, 3),
    "sort": lambda x: jnp.sort(x, None),
    "top_k": lambda x: lax.top_k(matrix(x), 3)[0],
    "cummax": lambda x: lax.cummax(matrix(x), 1),
    "cumprod": lambda x: jnp.cumprod(matrix(x), -1),
    "associative_scan": lambda x: lax.associative_scan(jnp.add, matrix(x), axis=-1),
    "max pool": lambda x: window(x.reshape(-1, 8) if x.size % 8 == 0 else fit(x, (4, 8)), -np.inf, lax.max),
    "sum pool": lambda x: window(x.reshape(-1, 8) if x.size % 8 == 0 else fit(x, (4, 8)), 0, lax.add),
}

BINARY = {
    "add": lambda x, y: x + fit(y, x.shape),
    "sub": lambda x, y: x - fit(y, x.shape),
    "mul": lambda x, y: x * fit(y, x.shape),
    "divide": lambda x, y: x / (1.0 + fit(y, x.shape) ** 2),
    "maximum": lambda x, y: jnp.maximum(x, fit(y, x.shape)),
    "where": lambda x, y: jnp.where((np.arange(x.size) % 3 == 0).reshape(x.shape), x, fit(y, x.shape)),
    "concatenate": lambda x, y: jnp.concatenate([matrix(x), fit(y, matrix(x).shape)]),
    "stack": lambda x, y: jnp.stack([x, fit(y, x.shape)]),
    "scatter add": lambda x, y: fit(x, (4, 8)).at[ROWS].add(fit(y, (4, 8))),
    "update slice": lambda x, y: lax.dynamic_update_slice(fit(x, (4, 8)), fit(y, (2, 8)), (1, 0)),
    "outer": lambda x, y: jnp.einsum("ik,jk->ij", fit(x, (4, 8)), fit(y, (8, 8))) / 8,
    "matmul": lambda x, y: matrix(x) @ fit(y, (8, 8)) / 8,
    "attention": lambda x, y: attention(fit(x, (4, 8)), fit(y, (4, 8)), -1e9),
    "cross-entropy": lambda x, y: -jnp.sum(jax.nn.log_softmax(fit(x, (4, 8))) * jax.nn.softmax(fit(y, (4, 8))), -1),
    "squared error": lambda x, y: jnp.mean((x - fit(y, x.shape)) ** 2),
}

WEIGHTED = {
    "dense": lambda p, x: matrix(x) @ p["w"] + p["b"],
    "dot": lambda p, x: matrix(x) @ p["v"],
    "dot from the left": lambda p, x: p["w"] @ fit(x, (8, 4)),
    "vector": lambda p, x: fit(x, (8,)) @ p["w"],
    "heads": lambda p, x: jnp.einsum("ik,hkd->hid", fit(x, (4, 8)), p["w"].reshape(2, 8, 4)),
    "affine norm": lambda p, x: layer_norm(matrix(x)) * p["scale"] + p["b"],
    "bias": lambda p, x: matrix(x) + p["b"],
    "gate": lambda p, x: matrix(x) * jax.nn.sigmoid(matrix(x) @ p["v"]),
    "mlp": lambda p, x: jax.nn.gelu(matrix(x) @ p["w"]) @ p["v"],
    "embedding": lambda p, x: matrix(x) + p["v"][p["n"] % 8],
    "conv1d": lambda p, x: conv(matrix(x), p["k1"]),
    "strided conv1d": lambda p, x: conv(matrix(x), p["k1"], 2),
    "conv2d": lambda p, x: conv(x, p["k2"]),
    "batch norm": lambda p, x: (matrix(x) - matrix(x).mean(0)) / jnp.sqrt(matrix(x).var(0) + 1e-5) * p["scale"],
}


def by_rows(f, p, x):
    rows = matrix(x).reshape(-1, 8)
    return lax.scan(lambda c, row: (0.9 * c + 0.1 * f(p, row),) * 2, fit(x, (8,)), rows, reverse=True)[1]


def summed(f, p, x):
    def step(carry, _):
        c, total = carry
        c = f(p, c)
        return (c, total + c), c.mean()

    (c, total), means = lax.scan(step, (x, jnp.zeros_like(x)), length=3)
    return c + total + means.sum()


def layers(f, p, x):
    def step(c, w):
        return c + 0.5 * f(p, jnp.tanh(c @ w)), None

    return lax.scan(step, fit(x, (4, 8)), jnp.stack([p["w"], p["v"]]))[0]


def while_loop(f, p, x):
    step = lambda c: (c[0] + 1, f(p, c[1]))
    return lax.while_loop(lambda c: c[0] < p["n"], step, (jnp.zeros_like(p["n"]), x))[1]


def own_jvp(f, p, x):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g(p, x)


def own_vjp(f, p, x):
    g = jax.custom_vjp(f)
    g.defvjp(lambda p, x: (f(p, x), (p, x)), lambda kept, ct: jax.vjp(f, *kept)[1](ct))
    return g(p, x)


def region(wrap):
    """A region of mpjax's, where a float32 program runs: by hand there is none."""
    return lambda f, p, x: wrap(f)(p, x) if x.dtype == jnp.float32 else f(p, x)


def nested(dtype):
    """Autocast to some dtype inside the program: by hand, casts."""

    def run(f, p, x):
        if x.dtype == jnp.float32:
            return mp.autocast(f, f"mixed_{dtype}")(p, x)
        return f(p, x) if x.dtype == jnp.float64 else f(cast(p, dtype), x.astype(dtype)).astype(x.dtype)

    return run


def cast(tree, dtype):
    """The floating leaves in another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


NESTED = {
    "residual scan": lambda f, p, x: lax.scan(lambda c, _: (c + 0.5 * f(p, c), None), x, length=3)[0],
    "scan": lambda f, p, x: lax.scan(lambda c, _: (f(p, c), None), x, length=2, reverse=True)[0],
    "scan over rows": by_rows,
    "summing scan": summed,
    "scan over layers": layers,
    "scan of checkpoints": lambda f, p, x: lax.scan(lambda c, _: (jax.checkpoint(f)(p, c), None), x, length=2)[0],
    "map": lambda f, p, x: lax.map(lambda row: f(p, row), matrix(x)),
    "vmap": lambda f, p, x: jax.vmap(f, (None, 0))(p, matrix(x)),
    "cond": lambda f, p, x: lax.cond(p["n"] > 2, lambda: f(p, x), lambda: x),
    "other cond": lambda f, p, x: lax.cond(p["n"] > 2, lambda: jnp.tanh(x), lambda: f(p, x)),
    "switch": lambda f, p, x: lax.switch(p["n"] % 3, [lambda: jnp.exp(-jnp.abs(x)), lambda: x, lambda: f(p, x)]),
    "fori": lambda f, p, x: lax.fori_loop(0, 2, lambda i, c: f(p, c), x),
    "summing fori": lambda f, p, x: lax.fori_loop(0, 3, lambda i, c: c + f(p, x), jnp.zeros_like(x)),
    "while": while_loop,
    "checkpoint": lambda f, p, x: jax.checkpoint(f)(p, x),
    "jit": lambda f, p, x: (lambda g: g(p, x + g(p, x)))(jax.jit(f)),
    "custom_jvp": own_jvp,
    "custom_vjp": own_vjp,
    "full": region(mp.full_precision),
    "keep": region(mp.keep_precision),
    "autocast bfloat16": nested("bfloat16"),
    "autocast float16": nested("float16"),
    "grad": lambda f, p, x: jax.grad(lambda x: jnp.sum(f(p, x) ** 2) / x.size)(x),
}


def body_of(program):
    """A function of parameters and a carry that returns a new carry."""
    return lambda p, c: fit(run(program, p, c)[0], c.shape)


def run(program, params, x):
    """The values that a program makes, the latest first."""
    pool = [x]
    for name, back, *rest in program:
        value = pool[back % len(pool)]
        if name in UNARY:
            value = UNARY[name](value)
        elif name in BINARY:
            value = BINARY[name](value, pool[rest[0] % len(pool)])
        elif name in WEIGHTED:
            value = WEIGHTED[name](params, value)
        else:
            value = NESTED[name](body_of(rest[0]), params, value)
        if value.size > LARGEST_SIZE:
            value = fit(value, (8, 8))
        # Only where nobody looks at the program: a name is one more reader of a value.
        pool.insert(0, checkpoint_name(value, "value") if x.dtype == jnp.float64 else value)
    return pool


def outputs(program, params, x):
    """What a whole program returns: the last value, and that before it in every other program.

    What is returned has one more reader, which rules that look ahead take into account.
    """
    last, before, *_ = run(program, params, x)
    return {"last": last, "before": before} if len(program) % 2 else {"last": last}


def names(program):
    """The names of all steps, those of inner programs too."""
    for name, *rest in program:
        yield name
        if name in NESTED:
            yield from names(rest[-1])


# Loops that JAX cannot reverse, and what has no forward mode.
FORWARD_ONLY, REVERSE_ONLY = ("while",), ("custom_vjp", "grad")


def programs(length, depth, without=FORWARD_ONLY):
    """Programs of up to some steps, after some matrix work.

    Args:
      length: the largest number of steps; half of that in an inner program.
      depth: how deep programs lie in each other.
      without: names that do not occur.
    """
    back = st.integers(0, 2)
    unary = st.tuples(st.sampled_from(list(UNARY)), back)
    binary = st.tuples(st.sampled_from(list(BINARY)), back, back)
    weighted = st.tuples(st.sampled_from(list(WEIGHTED)), back)
    kinds = [unary, binary, weighted]
    if depth:
        chosen = [name for name in NESTED if name not in without]
        body = programs(max(1, length // 2), depth - 1, without)
        kinds.append(st.tuples(st.sampled_from(chosen), back, body))
    return st.tuples(weighted, st.lists(st.one_of(kinds), max_size=length - 1)).map(lambda p: (p[0], *p[1]))
