"""Fifty thousand steps: one program, no growth of memory, nothing fetched by the host, and every count exact."""

import ctypes
import gc
import os
import re
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import scale_by_the_rule
from jax import monitoring

import mpjax as mp

# optax's bias correction relies on JAX's usual promotion.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.standard_promotion,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm"),
]

STEPS, WARM_UP, POOL, ROWS, WIDTH = 50_000, 2_000, 97, 8, 16
FIRST, PERIOD, CEILING = 2.0**10, 40, 2.0**14
# Of the batches that come around one is past float16, and in one stretch that one comes every time: to the floor.
BAD, STRETCH = 13, range(20_000, 20_064)
# What Python's allocator and the system's keep for a while is within these. A number forgotten at each step is past the
# first, and a few kilobytes are past the second, which also sees what is not Python's.
TRACED_BOUND, RESIDENT_BOUND = 64 * 1024, 8 * 1024**2


def which(i):
    """The batch of a step."""
    return BAD if i in STRETCH else i % POOL


def loss_fn(params, batch):
    hidden = jax.nn.relu(batch["x"] @ params["w1"] + params["b"])
    return jnp.mean((hidden @ params["w2"] - batch["y"]) ** 2)


class Loop:
    """The canonical loop with donated state, and all its batches on the device from the start."""

    def __init__(self, count_traces):
        cast = mp.autocast(loss_fn, "mixed_float16")
        inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
        tx = mp.loss_scaled(inner, mp.DynamicLossScale(FIRST, period=PERIOD, max_loss_scale=CEILING))

        def step(params, opt_state, batch):
            loss, grads = mp.value_and_grad(cast, mp.get_loss_scale(opt_state))(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        rng = np.random.default_rng(0)
        normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)
        params = {"w1": normal(WIDTH, WIDTH), "b": normal(WIDTH), "w2": normal(WIDTH, 1)}
        self.batches = [{"x": normal(ROWS, WIDTH), "y": normal(ROWS, 1)} for _ in range(POOL)]
        self.batches[BAD]["x"] = self.batches[BAD]["x"].at[3, 5].set(1e5)
        self.state = params, tx.init(params)
        self.traced = count_traces(step)
        self.step = jax.jit(self.traced, donate_argnums=(0, 1))
        self.taken = 0

    def run(self, steps, and_then=lambda loss: None):
        """Steps with the guard on: an input that is not on the device, a constant even, is an error."""
        params, opt_state = self.state
        with jax.transfer_guard("disallow"):
            for i in range(self.taken, self.taken + steps):
                params, opt_state, loss = self.step(params, opt_state, self.batches[which(i)])
                and_then(loss)
        self.state = params, opt_state
        self.taken += steps
        return loss


def memory():
    """Bytes of Python's objects since the first call, bytes of the process in memory, and the number of arrays."""
    if not tracemalloc.is_tracing():
        tracemalloc.start()
    gc.collect()
    # Hands free pages back to the system, where there is such a call: a leak might fill those first, and be missed.
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return np.array([tracemalloc.get_traced_memory()[0], resident, len(jax.live_arrays())])


def past_bounds(growth):
    """Which of the three have grown past their bounds."""
    return (growth > [TRACED_BOUND, RESIDENT_BOUND, 0]).tolist()


def reaches_the_host(jitted, *args):
    """Whether a program talks to the host while it runs.

    The guard cannot see that on a CPU, where reading an array is no transfer. A program has no way but these.
    """
    return bool(re.search("callback|infeed|outfeed", jitted.lower(*args).compile().as_text()))


@pytest.fixture(autouse=True)
def untraced():
    yield
    tracemalloc.stop()


@pytest.fixture
def compilations():
    """All from now on."""
    found = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    yield found
    monitoring.unregister_event_duration_listener(listen)


def test_fifty_thousand_steps(count_traces, compilations, record_property):
    loop = Loop(count_traces)
    compilations.clear()
    first = float(loop.run(1))
    memory()
    loop.run(WARM_UP - 1)
    before = memory()
    last = float(loop.run(STEPS - WARM_UP))
    growth = memory() - before
    assert len(compilations) == loop.traced.traces == loop.step._cache_size() == 1
    assert past_bounds(growth) == [False, False, False]

    overflows = [which(i) == BAD for i in range(STEPS)]
    scales, clean, at_floor = scale_by_the_rule(overflows, FIRST, PERIOD, CEILING)
    params, opt_state = loop.state
    scale, skip_state = opt_state.loss_scale, opt_state.skip_state
    state = float(scale.loss_scale), int(scale.counter), int(scale.at_floor)
    assert state == (scales[-1], clean[-1], at_floor[-1])
    assert min(scales) == 1
    assert (int(skip_state.skips_total), int(skip_state.skips_in_a_row)) == (sum(overflows), 0)
    assert int(skip_state.inner_state[1][0].count) == STEPS - sum(overflows)
    assert bool(mp.all_finite((params, opt_state)))
    assert last < first / 2
    assert not reaches_the_host(loop.step, params, opt_state, loop.batches[0])

    counts = (
        f"{STEPS} steps, {sum(overflows)} skipped, {at_floor[-1]} of them at the floor; after {WARM_UP} steps memory "
        f"grew by {growth[0]} bytes of Python's, {growth[1]} bytes resident, {growth[2]} arrays"
    )
    record_property("counts", counts)


def test_a_leak_is_seen(count_traces):
    """By the same measure, over a twelfth of the steps, in a loop that keeps something of each."""
    loop, kept = Loop(count_traces), []
    loop.run(1)
    memory()
    loop.run(WARM_UP)

    def over(and_then):
        before = memory()
        loop.run(STEPS // 12, and_then)
        return past_bounds(memory() - before)

    assert over(lambda loss: None) == [False, False, False]
    assert over(lambda loss: kept.append(len(kept) + 0.5)) == [True, False, False]
    assert over(lambda loss: kept.append(bytes(4096))) == [True, True, False]
    assert over(kept.append)[::2] == [True, True]


def test_what_is_refused(count_traces):
    """An input of NumPy by the guard; a callback by the look at the program."""
    loop = Loop(count_traces)
    loop.batches[0] = jax.device_get(loop.batches[0])
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.run(1)

    def talks(x):
        jax.debug.callback(lambda value: None, x)
        return x

    assert reaches_the_host(jax.jit(talks), 1.0)
