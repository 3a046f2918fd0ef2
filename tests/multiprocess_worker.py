"""One process of several: the runs that tests/test_multiprocess.py compares. It writes what it saw as JSON."""

import argparse
import json
import os
import signal
from pathlib import Path

import jax
import lm_run
import numpy as np

SAVE_EVERY = 4


def parity(args):
    """Whole runs, each of a policy and a layout."""
    found = {}
    for job in args.jobs:
        policy, layout = job.split(",")
        one = lm_run.Run(policy, layout)
        state, losses, history, overflows_here = one.start(), [], [], []
        for batch in lm_run.batches():
            weights = one.on_devices(batch)["weights"]
            overflows_here.append(not all(np.isfinite(x.data).all() for x in weights.addressable_shards))
            state, loss = one.advance(state, batch)
            losses.append(loss)
            history.append(lm_run.scale_and_skips(state))
        found[job] = {
            "losses": losses,
            "history": history,
            "overflows_here": overflows_here,
            "digests": {name: sorted(different) for name, different in lm_run.digests(state).items()},
        }
    return found


def checkpoints(args):
    """A run that saves, goes on from the last save, and may die at a step: within it, before gradients are reduced."""
    import orbax.checkpoint as ocp

    calls = []

    def die(head):
        calls.append(None)
        if first + len(calls) == args.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return head

    def between(grads):
        head = grads["head"]
        return grads | {"head": jax.pure_callback(die, jax.ShapeDtypeStruct(head.shape, head.dtype), head)}

    one = lm_run.Run("mixed_float16", "shard_map unchecked", between)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(args.directory / "checkpoints", options=options) as manager:
        state, first = one.start(), manager.latest_step() or 0
        if first:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            state = manager.restore(first, args=ocp.args.StandardRestore(shapes))
        for step, batch in enumerate(lm_run.batches(), 1):
            if step > first:
                state, _ = one.advance(state, batch)
                if step % SAVE_EVERY == 0:
                    manager.save(step, args=ocp.args.StandardSave(state))
    return {
        "first": first,
        "history": lm_run.scale_and_skips(state),
        "digests": {name: sorted(different) for name, different in lm_run.digests(state).items()},
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["parity", "checkpoints"])
    parser.add_argument("--address")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--jobs", nargs="*")
    parser.add_argument("--die-at", type=int)
    args = parser.parse_args()
    jax.distributed.initialize(
        args.address, args.processes, args.process, heartbeat_timeout_seconds=20, shutdown_timeout_seconds=60
    )
    found = {"parity": parity, "checkpoints": checkpoints}[args.mode](args)
    found = {"processes": jax.process_count(), "devices": jax.device_count(), "found": found}
    (args.directory / f"{args.process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
