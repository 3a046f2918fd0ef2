"""Gradients inside a loss, in mixed precision: a potential that is fitted to energies and to forces.

    pip install "mpjax[examples]"
    python examples/pinn_or_forces.py                           # the policy for this machine's hardware
    python examples/pinn_or_forces.py --policy mixed_float16    # any other: mixed_bfloat16, float32 ...

A force is minus the gradient of the energy in the positions, so that the loss holds a gradient, and training takes the
gradient of that; networks that solve differential equations (PINNs) are made in the same way. Eight atoms near the
corners of a cube attract and repel each other after Lennard and Jones, who give the true energies and forces. The
network learns what each pair of atoms adds to the energy. The model is plain float32 code; what mpjax adds is numbered
from 1 to 4. In the end the forces are compared with the true ones, and with those of the same weights in float32, and
the whole training is done in float32 too.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import mpjax as mp

ATOMS = 8
CLUSTERS, HELD_OUT = 2048, 256
REPORT_EVERY = 20


class PairEnergy(nn.Module):
    """What a pair of atoms adds to the energy, as a function of their distance; it knows nothing about precision."""

    @nn.compact
    def __call__(self, distances: jax.Array) -> jax.Array:
        """Maps distances of shape (pairs,) to energies of the same shape."""
        # Soft steps along the distance: the gradient of a network of smooth functions is smooth.
        x = jnp.exp(-50.0 * (distances[:, None] - jnp.linspace(0.8, 2.4, 33)) ** 2)
        for _ in range(2):
            x = nn.silu(nn.Dense(64)(x))
        return nn.Dense(1)(x)[:, 0]


def distances_of(positions: jax.Array) -> jax.Array:
    """All distances between two atoms, of shape (pairs,), from positions of shape (atoms, 3)."""
    first, second = np.triu_indices(ATOMS, 1)
    return jnp.linalg.norm(positions[first] - positions[second], axis=-1)


def energy(params: Any, positions: jax.Array) -> jax.Array:
    """The network's energy of a cluster."""
    energies: Any = PairEnergy().apply(params, distances_of(positions))
    return energies.sum()


def true_energy(positions: jax.Array) -> jax.Array:
    """4 (r^-12 - r^-6), summed over all pairs."""
    power = distances_of(positions) ** -6
    return 4.0 * (power**2 - power).sum()


def load(seed: int) -> dict[str, np.ndarray]:
    """Clusters near the corners of a cube, with their true energies and forces."""
    random = np.random.default_rng(seed)
    corners = 1.15 * np.stack(np.meshgrid(*[[0.0, 1.0]] * 3), axis=-1).reshape(ATOMS, 3)
    positions = (corners + 0.04 * random.standard_normal((CLUSTERS + HELD_OUT, ATOMS, 3))).astype(np.float32)
    energies, slopes = jax.jit(jax.vmap(jax.value_and_grad(true_energy)))(positions)
    energies, forces = np.asarray(energies), -np.asarray(slopes)
    return {"positions": positions, "energies": energies - energies.mean(), "forces": forces}


def train(policy: mp.Policy, data: dict[str, np.ndarray], args: argparse.Namespace, console: Console) -> Any:
    """Trains, and returns the parameters, the loss of each step and how many steps were skipped."""
    # 1. The inner gradient in mixed precision: autocast goes through jax.grad, and jax.grad through autocast. The
    #    positions, distances and forces stay in float32; the products of the network, forward and backward, do not.
    energies_and_slopes = jax.vmap(mp.autocast(jax.value_and_grad(energy, argnums=1), policy), in_axes=(None, 0))

    def loss_fn(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        energies, slopes = energies_and_slopes(params, batch["positions"])
        return jnp.mean((energies - batch["energies"]) ** 2) / ATOMS + jnp.mean((slopes + batch["forces"]) ** 2)

    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, warmup_steps=args.steps // 10, decay_steps=args.steps)
    # 2. Outermost: unscales the gradients, and skips a step whose gradients overflowed.
    tx = mp.loss_scaled(optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule)), policy.loss_scale())

    @jax.jit
    def train_step(params: Any, opt_state: Any, batch: dict[str, jax.Array]) -> tuple[Any, Any, jax.Array]:
        # 3. The true loss, and the gradients of the loss times the scale: gradients of a gradient.
        loss, grads = mp.value_and_grad(loss_fn, mp.get_loss_scale(opt_state))(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    # 4. Parameters in the policy's dtype: float32 for the mixed policies.
    params = policy.cast_to_param(PairEnergy().init(jax.random.key(args.seed), jnp.ones(1)))
    opt_state, losses = tx.init(params), []
    random = np.random.default_rng(args.seed)
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("compiling", total=args.steps)
        for i in range(1, args.steps + 1):
            rows = random.integers(CLUSTERS, size=args.batch)
            params, opt_state, loss = train_step(params, opt_state, {name: x[rows] for name, x in data.items()})
            losses.append(loss)
            if i % REPORT_EVERY == 0 or i == args.steps:  # reading a number waits for the device
                shown = f"loss {loss:.4f}, {opt_state.skip_state.skips_total} skipped"
                progress.update(bar, completed=i, description=shown)
    return params, [float(loss) for loss in jax.device_get(losses)], int(opt_state.skip_state.skips_total)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The root mean square of the difference, as a share of that of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains with the policy and in float32, prints and returns the errors of forces on clusters held out."""
    parser = argparse.ArgumentParser(description="Energies and forces in mixed precision.")
    parser.add_argument("--policy", help='"mixed_bfloat16", "mixed_float16", "float32" ...; default: by hardware')
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64, help="clusters a step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    policy = mp.get_policy(args.policy) if args.policy else mp.default_policy()
    console = Console(highlight=False)
    data = load(args.seed)
    held_out = {name: x[CLUSTERS:] for name, x in data.items()}

    def forces(params: Any, policy: mp.Policy) -> np.ndarray:
        low = jax.vmap(mp.autocast(jax.grad(energy, argnums=1), policy), in_axes=(None, 0))
        return -np.asarray(jax.jit(low)(params, held_out["positions"]))

    float32 = mp.get_policy("float32")
    console.print(f"{policy}\n{args.steps} steps of {args.batch} clusters of {ATOMS} atoms, and the same in float32")
    params, losses, skips = train(policy, data, args, console)
    wide_params, _, _ = train(float32, data, args, console)
    found, wide = forces(params, policy), forces(wide_params, float32)
    result = {
        "losses": losses,
        "skips": skips,
        "error": error(found, held_out["forces"]),
        "float32_error": error(wide, held_out["forces"]),
        "rounding": error(found, forces(params, float32)),
    }
    console.print(
        "error of forces on held-out clusters: {error:.2%}; trained in float32: {float32_error:.2%}\n"
        "from the same weights in float32 they differ by {rounding:.2%}; {skips} steps skipped".format(**result)
    )
    return result


if __name__ == "__main__":
    main()
