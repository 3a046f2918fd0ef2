"""What `mpjax bench` measures: a matrix product and a training step in each precision, taking turns."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import mpjax as mp
from mpjax._hardware import hardware_of

PRODUCT, STEP = "matrix product", "training step"
_LAYERS = 3


@dataclasses.dataclass(frozen=True)
class Work:
    """Something to measure.

    Attributes:
      kind: `PRODUCT` or `STEP`.
      precision: as a table names it.
      flops: of one turn.
      start: starts a turn and returns an array to wait for.
    """

    kind: str
    precision: str
    flops: int
    start: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured of it.

    Attributes:
      kind, precision, flops: as in `Work`.
      seconds: of one turn, in each run.
      finite: whether the last result was.
    """

    kind: str
    precision: str
    flops: int
    seconds: tuple[float, ...]
    finite: bool

    @property
    def median(self) -> float:
        """Seconds of the middle run."""
        return statistics.median(self.seconds)

    @property
    def middle_half(self) -> tuple[float, float]:
        """Seconds between which the middle half of the runs lies: a hiccup of the machine moves neither."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def is_faster_than(self, other: "Measurement") -> bool:
        """Whether it is, by more than the two vary."""
        return self.middle_half[1] < other.middle_half[0]


def measure(
    work: Sequence[Work], runs: int, turns: int, clock: Callable[[], float] = time.perf_counter
) -> list[Measurement]:
    """Measures each piece of work in every run, so that what slows the machine down for a while slows all of them.

    Args:
      work: what to measure.
      runs: how often each is measured.
      turns: of each in a run, one behind the other: what a launch costs is hidden where devices work by themselves.
      clock: seconds.
    """
    results = [jax.block_until_ready(each.start()) for each in work]  # compiles
    seconds: list[list[float]] = [[] for _ in work]
    for _ in range(runs):
        for i, each in enumerate(work):
            begin = clock()
            for _ in range(turns):
                results[i] = each.start()
            jax.block_until_ready(results[i])
            seconds[i].append((clock() - begin) / turns)
    return [
        Measurement(each.kind, each.precision, each.flops, tuple(times), bool(jnp.isfinite(result).all()))
        for each, times, result in zip(work, seconds, results, strict=True)
    ]


def products(size: int, device: Any) -> list[Work]:
    """Matrix products of `size` x `size` in the dtypes that a device has."""
    dtypes: list[tuple[str, Any, Any]] = [
        ("float32", jnp.float32, None),
        ("bfloat16", jnp.bfloat16, None),
        ("float16", jnp.float16, None),
    ]
    if device.platform != "cpu":  # where float32 may be computed in TF32 or bfloat16
        dtypes.insert(0, ("float32, precision highest", jnp.float32, jax.lax.Precision.HIGHEST))
    if hardware_of(device).has_fp8(device):
        dtypes.append(("float8_e4m3fn", jnp.float8_e4m3fn, None))
    return [Work(PRODUCT, name, 2 * size**3, _product(size, dtype, precision)) for name, dtype, precision in dtypes]


def _product(size: int, dtype: Any, precision: Any) -> Callable[[], Any]:
    # Rows by rows: the one layout that fp8 units take.
    numbers = (((1,), (1,)), ((), ()))
    result = jnp.bfloat16 if jnp.dtype(dtype).itemsize == 1 else dtype
    run = jax.jit(lambda a, b: jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=result))
    a, b = (jax.random.normal(key, (size, size)).astype(dtype) for key in jax.random.split(jax.random.key(0)))
    return lambda: run(a, b)


def steps(size: int, device: Any) -> list[Work]:
    """Training steps of a network of three layers of `size` x `size`, with AdamW, on a batch of `size`."""
    # Forward, the gradients of weights, and those of activations but for the first layer's.
    flops = (3 * _LAYERS - 1) * 2 * size**3
    policies = ["float32", "mixed_bfloat16", "mixed_float16"]
    policies += ["mixed_float8"] if hardware_of(device).has_fp8(device) else []
    return [Work(STEP, name, flops, _step(size, mp.get_policy(name))) for name in policies]


def _step(size: int, policy: mp.Policy) -> Callable[[], Any]:
    tx = mp.loss_scaled(optax.adamw(1e-4), policy.loss_scale())

    def loss_fn(params: list[Any], batch: Any) -> Any:
        x = batch
        for w in params:
            x = jax.nn.relu(x @ w)
        return jnp.mean((x - batch) ** 2)

    cast = mp.autocast(loss_fn, policy)

    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        loss, grads = mp.value_and_grad(cast, mp.get_loss_scale(opt_state))(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    jitted = jax.jit(step, donate_argnums=(0, 1))
    keys = jax.random.split(jax.random.key(0), _LAYERS + 1)
    params = [jax.random.normal(key, (size, size)) / size**0.5 for key in keys[1:]]
    batch = jax.random.normal(keys[0], (size, size))
    state = [params, tx.init(params)]

    def start() -> Any:
        *state[:], loss = jitted(*state, batch)
        return loss

    return start
