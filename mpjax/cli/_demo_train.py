"""One run of `mpjax demo`: a jitted mixed-precision step, and what is measured around it."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpjax as mp
from mpjax.cli._demo_tasks import Digits, Precision, Task

PROBES = 3
REPORT_EVERY = 20


class TrainState(NamedTuple):
    """What a step takes and returns.

    Attributes:
      params: float32.
      stats: BatchNorm's running statistics, float32; empty without BatchNorm.
      opt_state: of `mpjax.loss_scaled`.
    """

    params: Any
    stats: Any
    opt_state: Any


class StepMetrics(NamedTuple):
    """What a step reports, on the device: mean cross entropy, the scale it used, and whether it was taken."""

    loss: Any
    scale: Any
    finite: Any


class Probe(NamedTuple):
    """A run's backward pass against the float32 one, at the same parameters and batch.

    Attributes:
      flushed: entries that are 0 here and not in float32.
      nonzero: entries that are not 0 in float32.
      true_grads: the float32 gradients' entries.
      scale: the run's loss scale.
    """

    flushed: Any
    nonzero: Any
    true_grads: Any
    scale: Any


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run, on the host.

    Attributes:
      task: what was trained.
      precision: and in which precision.
      metrics: each step's, as arrays of shape (steps,).
      accuracy: on the test images, between 0 and 1.
      probes: measured at a few steps spread over the run.
      final_scale: the loss scale after the last step.
      param_bytes: of the parameters that are kept.
      temp_bytes: the compiler's figure for the step's temporaries; None where the backend gives none.
      matmul_dtypes: result dtypes of the compiled step's matmuls and convolutions.
    """

    task: Task
    precision: Precision
    metrics: StepMetrics
    accuracy: float
    probes: list[Probe]
    final_scale: float
    param_bytes: int
    temp_bytes: int | None
    matmul_dtypes: tuple[str, ...]

    @property
    def final_loss(self) -> float:
        """Mean cross entropy of the last 20 steps, before the task's loss weight."""
        return float(np.mean(self.metrics.loss[-20:]))

    @property
    def flushed(self) -> float:
        """Share of the nonzero float32 gradient entries that are 0 in this run's backward pass; mean of the probes."""
        return float(np.mean([probe.flushed / max(probe.nonzero, 1) for probe in self.probes]))

    @property
    def skipped(self) -> int:
        """How many steps overflowed and were skipped."""
        return int(np.sum(~self.metrics.finite))


def train(
    task: Task, precision: Precision, digits: Digits, steps: int, seed: int, advance: Callable[[int], None]
) -> Run:
    """Trains one network in one precision.

    Args:
      task: what to train.
      precision: policy and loss scale.
      digits: the data.
      steps: how many steps of `BATCH` images.
      seed: of the initial parameters and of the batches' order.
      advance: called now and then with the number of steps done since the last call.
    """
    policy = mp.get_policy(precision.policy)
    rows = digits.batches(steps, seed)
    variables = task.model.init(jax.random.key(seed), digits.train_images[:1], train=False)
    tx = mp.loss_scaled(task.optimizer(steps), precision.loss_scale())
    params = variables["params"]
    state = TrainState(params, variables.get("batch_stats", {}), tx.init(params))

    def batch(i: int) -> tuple[np.ndarray, np.ndarray]:
        return digits.train_images[rows[i]], digits.train_labels[rows[i]]

    step = jax.jit(_make_step(task, policy, tx)).lower(state, *batch(0)).compile()
    probe = jax.jit(_make_probe(task, policy))
    probe_at = {(2 * k + 1) * steps // (2 * PROBES) for k in range(PROBES)}

    # Everything stays on the device until the run is over: no step waits for the host.
    metrics, probes = [], []
    for i in range(steps):
        if i in probe_at:
            probes.append(probe(state, *batch(i)))
        state, measured = step(state, *batch(i))
        metrics.append(measured)
        if (i + 1) % REPORT_EVERY == 0 or i + 1 == steps:
            advance((i % REPORT_EVERY) + 1)
    accuracy = jax.jit(_make_accuracy(task, policy))(state, digits.test_images, digits.test_labels)
    metrics, probes, accuracy, scale = jax.device_get((metrics, probes, accuracy, _current_scale(state)))
    return Run(
        task=task,
        precision=precision,
        metrics=StepMetrics(*(np.asarray(values) for values in zip(*metrics, strict=True))),
        accuracy=float(accuracy),
        probes=probes,
        final_scale=float(scale),
        param_bytes=sum(x.nbytes for x in jax.tree.leaves(state.params)),
        # None, or an object without the figure, on backends that do not analyse.
        temp_bytes=getattr(step.memory_analysis(), "temp_size_in_bytes", None),
        matmul_dtypes=tuple(re.findall(r"= (\w+)\[[^\]]*\]\S* (?:dot|convolution)\(", step.as_text() or "")),
    )


def _current_scale(state: TrainState) -> Any:
    return jnp.float32(mp.get_loss_scale(state.opt_state).loss_scale)


def _make_loss(task: Task, policy: mp.Policy) -> Callable[..., Any]:
    def loss_fn(params: Any, stats: Any, images: Any, labels: Any) -> tuple[Any, Any]:
        params, images = policy.cast_to_compute((params, images))
        logits, updated = task.model.apply(
            {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
        )
        logits = policy.cast_to_output(logits)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return task.loss_weight * loss, (loss, updated.get("batch_stats", {}))

    return loss_fn


def _make_step(task: Task, policy: mp.Policy, tx: optax.GradientTransformation) -> Callable[..., Any]:
    loss_fn = _make_loss(task, policy)

    def step(state: TrainState, images: Any, labels: Any) -> tuple[TrainState, StepMetrics]:
        params, stats, opt_state = state
        loss_scale = mp.get_loss_scale(opt_state)
        (_, (loss, new_stats)), grads = mp.value_and_grad(loss_fn, loss_scale, has_aux=True)(
            params, stats, images, labels
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        finite = opt_state.skip_state.last_step_finite
        # An overflow in the forward pass would stay in the running statistics for good.
        stats = mp.select_tree(finite, new_stats, stats)
        metrics = StepMetrics(loss, _current_scale(state), finite)
        return TrainState(optax.apply_updates(params, updates), stats, opt_state), metrics

    return step


def _make_probe(task: Task, policy: mp.Policy) -> Callable[..., Probe]:
    def entries(grads: Any) -> Any:
        return jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])

    def probe(state: TrainState, images: Any, labels: Any) -> Probe:
        loss_scale = mp.get_loss_scale(state.opt_state)
        args = (state.params, state.stats, images, labels)
        own = entries(mp.grad(_make_loss(task, policy), loss_scale, has_aux=True)(*args)[0])
        wide = _make_loss(task, mp.get_policy("float32"))
        true = entries(jax.grad(wide, has_aux=True)(*args)[0])
        flushed = jnp.sum((own == 0) & (true != 0))
        return Probe(flushed, jnp.sum(true != 0), true, _current_scale(state))

    return probe


def _make_accuracy(task: Task, policy: mp.Policy) -> Callable[..., Any]:
    def accuracy(state: TrainState, images: Any, labels: Any) -> Any:
        params, images = policy.cast_to_compute((state.params, images))
        logits: Any = task.model.apply({"params": params, "batch_stats": state.stats}, images, train=False)
        return (logits.argmax(-1) == labels).mean()

    return accuracy
