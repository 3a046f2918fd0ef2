"""examples/train_lm.py: it learns, in shards as on one device, and no kill, signal or full disk changes what."""

import errno
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import bits
from jax.experimental.compilation_cache import compilation_cache

import mpjax as mp

# optax's bias correction and schedules rely on JAX's usual promotion.
pytestmark = pytest.mark.standard_promotion

PATH = Path(__file__).parent.parent / "examples" / "train_lm.py"
STEPS, STOP_AT = 12, 6
SIZES = ["--batch", "16", "--length", "16", "--layers", "2", "--width", "64", "--rate", "1e-2"]
SMALL = [*SIZES, "--policy", "float32", "--mesh", "1x1", "--steps", str(STEPS), "--save-every", "4"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_lm", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(tmp_path_factory):
    """Nearly all the time of a small run is compilation: little optimized, and once for all tests of this file."""

    def use(optimized, directory, seconds):
        jax.config.update("jax_disable_most_optimizations", not optimized)
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
        compilation_cache.reset_cache()

    use(False, str(tmp_path_factory.mktemp("cache")), 0.0)
    yield
    use(True, None, 1.0)


@pytest.fixture(scope="module")
def whole(example, tmp_path_factory):
    """The directory of a run that nothing stopped."""
    directory = tmp_path_factory.mktemp("whole")
    with jax.numpy_dtype_promotion("standard"):
        assert example.main([*SMALL, "--directory", str(directory)]) == 0
    return directory


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def kept(directory):
    """The steps of the complete checkpoints."""
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdecimal())


def state_of(directory, step):
    """Parameters and optimizer state of a checkpoint, in NumPy."""
    path = directory / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(path).item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        return checkpointer.restore(path, restore_args=how)


def same_run(directory, other, step):
    """Whether two runs ended in the same bits, with the same metrics of every step."""
    assert bits(state_of(directory, step)) == bits(state_of(other, step))
    assert (directory / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


# In this process -----------------------------------------------------------------------------------------------------


def test_it_learns(whole):
    found = lines(whole)
    assert [line["step"] for line in found] == [*range(1, STEPS + 1), STEPS]
    assert found[0]["loss"] > 5  # a guess among 256 has 5.5
    assert found[-2]["loss"] < 4
    assert found[-1]["held_out"] < found[0]["loss"] - 1
    assert found[-1]["held_out_average"] != found[-1]["held_out"]
    assert kept(whole) == [4, 8, 12]


def test_a_signal_saves_and_the_next_run_goes_on_exactly(example, whole, tmp_path, capsys, monkeypatch):
    batch = example.Reader.batch

    def interrupted(reader, position, size):
        if position == (STOP_AT - 1) * size:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(reader, position, size)

    command = [*SMALL, "--directory", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(example.Reader, "batch", interrupted)
        assert example.main(command) == 0
    assert f"stopped after step {STOP_AT}, which is saved in" in capsys.readouterr().out
    assert kept(tmp_path) == [4, STOP_AT]
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, STOP_AT + 1))

    assert example.main(command) == 0
    assert f"going on after step {STOP_AT}" in capsys.readouterr().out
    assert kept(tmp_path) == [STOP_AT, 8, 12]
    same_run(tmp_path, whole, STEPS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_is_not_held_up(example, number):
    stop, before, seen = example.Stop(), signal.getsignal(number), []
    signal.signal(number, lambda *_: seen.append(number))
    own = signal.getsignal(number)
    try:
        with stop.listening():
            assert not stop(1)
            signal.raise_signal(number)
            assert stop(1)
            assert not seen
            signal.raise_signal(number)
            assert seen == [number]
        assert signal.getsignal(number) is own
    finally:
        signal.signal(number, before)


def test_a_finished_run_is_only_evaluated_again(example, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "again")
    assert example.main([*SMALL, "--directory", str(tmp_path / "again")]) == 0
    same_run(tmp_path / "again", whole, STEPS)


@pytest.mark.slow
def test_eight_devices_do_what_one_does(example, whole, tmp_path):
    assert example.main([*SMALL, "--mesh", "4x2", "--directory", str(tmp_path)]) == 0
    for a, b in zip(lines(tmp_path), lines(whole), strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    for a, b in zip(*(jax.tree.leaves(state_of(d, STEPS)["params"]) for d in (tmp_path, whole)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_parameters_and_optimizer_state_are_in_shards(example):
    mesh = example.make_mesh(4, 2)
    tx = example.make_optimizer(mp.get_policy("mixed_float16"), STEPS, 1e-2)

    def init():
        params = nnx.state(example.Decoder(2, 64, 16, rngs=nnx.Rngs(0)))
        return {"params": params, "opt_state": tx.init(params)}

    shapes = jax.eval_shape(init)
    whole, of_one = {"params": 0, "opt_state": 0}, {"params": 0, "opt_state": 0}
    for name in whole:
        shardings = example.shardings_of(shapes[name], mesh)
        for x, sharding in zip(jax.tree.leaves(shapes[name]), jax.tree.leaves(shardings), strict=True):
            whole[name] += x.size
            of_one[name] += np.prod(sharding.shard_shape(x.shape), dtype=int)
        # Norms, counts and the scale are whole on every device, and positions are not cut over "model".
        assert whole[name] / 8 < of_one[name] < whole[name] / 7
    # Two moments, the average and what it rounds off.
    assert of_one["opt_state"] - 4 * of_one["params"] < 20


def test_an_overflow_is_skipped_and_the_scale_backs_off(example, tmp_path, monkeypatch):
    start = mp.DynamicLossScale(2.0**26, period=4)
    monkeypatch.setattr(mp.Policy, "loss_scale", lambda policy: start)
    assert example.main([*SMALL, "--policy", "mixed_float16", "--directory", str(tmp_path)]) == 0
    *steps, last = lines(tmp_path)
    skipped = np.diff([0, *(line["skips"] for line in steps)])
    assert 3 <= skipped.sum() < STEPS
    # The scale after each step, by the rule: halved by a skip, doubled by four clean steps in a row.
    scale, clean = 2.0**26, 0
    for skip, line in zip(skipped, steps, strict=True):
        clean = 0 if skip else clean + 1
        scale = scale / 2 if skip else scale * 2 if clean == 4 else scale
        clean %= 4
        assert line["scale"] == scale
    assert np.isfinite([line["loss"] for line in steps]).all()
    assert last["held_out"] < steps[0]["loss"] - 1


def test_matrix_work_is_in_the_compute_dtype(example):
    def make():
        return example.Decoder(2, 64, 16, rngs=nnx.Rngs(0))

    loss_fn = example.loss_of(nnx.graphdef(nnx.eval_shape(make)))
    params, rows = jax.eval_shape(lambda: nnx.state(make())), jax.ShapeDtypeStruct((4, 17), jnp.int32)
    with jax.set_mesh(example.make_mesh(4, 2)):
        found = mp.explain(jax.value_and_grad(loss_fn), "mixed_bfloat16")(params, rows)
    dots = [row for row in found.operations if row.primitive == "dot_general"]
    # In each of two layers four matrices and the two products of attention, and the head, each with its two gradients;
    # on the way back all in the layers but the last one is computed again.
    assert {dtype for row in dots for dtype in row.inputs} == {"bfloat16"}
    assert sum(row.count for row in dots) == 2 * (3 * 6 + 5) + 3
    assert not found.not_entered


def test_other_settings_are_no_resume(example, whole, tmp_path):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    changed = ["--seed", "1", "--policy", "bfloat16", "--directory", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"(?s)holds a run with other settings.*policy: .*float32.*seed: 0, now 1"):
        example.main([*SMALL, *changed])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "4x4"], "--mesh 4x4 needs 16 devices; there are 8"),
        (["--mesh", "8x1", "--batch", "24"], "--batch 24 is no multiple of 16"),
        (["--width", "48"], "--width 48 is no multiple of 32"),
        (["--mesh", "1x4"], "makes 2 heads, which 4 shards cannot have"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(example, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        example.main([*SMALL, "--directory", str(tmp_path), *flags])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--mesh", "4by2"], ["--mesh", "0x1"], ["--microbatches", "0"]])
def test_flags_that_mean_nothing_are_refused(example, capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        example.main(flags)
    assert f"argument {flags[0]}: invalid" in capsys.readouterr().err


def test_a_failed_save_says_where_to_go_on(example, tmp_path, monkeypatch):
    checkpoints = example.Checkpoints(tmp_path, {"seed": 0})
    checkpoints.save(1, {"w": jnp.ones(3)}, 16)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.manager, "save", full)
        with pytest.raises(SystemExit, match=r"(?s)of step 2 could not .* No space left .* last good one is of step 1"):
            checkpoints.save(2, {"w": jnp.zeros(3)}, 32)
    step, state, position = checkpoints.restore({"w": jnp.zeros(3)})
    assert (step, position, state["w"].tolist()) == (1, 16, [1, 1, 1])


def test_metrics_are_cut_back_to_the_checkpoint(example, tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole_lines = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    for rest in (b"", b'{"step": 3, "lo', b'{"step": 3, "loss": 0.5}\n{"st', b'{"step": 2, "held_out": 3.0}\n'):
        path.write_bytes(whole_lines + rest)
        metrics = example.Metrics(path, step=2)
        metrics.add(3, {"loss": jnp.float32(0.25)})
        assert metrics.flush() == {"step": 3, "loss": 0.25}
        assert path.read_bytes() == whole_lines + b'{"step": 3, "loss": 0.25}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's disk that is always full")
def test_metrics_on_a_full_disk_say_so(example, tmp_path):
    metrics = example.Metrics(tmp_path / "metrics.jsonl", step=0)
    metrics.path = Path("/dev/full")
    metrics.add(1, {"loss": 0.5})
    with pytest.raises(SystemExit, match=r"/dev/full could not be written: .* No space left on device\nMake room"):
        metrics.flush()


def test_each_epoch_reads_every_row_once(example):
    text = np.arange(203, dtype=np.uint8)
    reader = example.Reader(text, length=10, seed=3)
    batches = [reader.batch(position, 4) for position in range(0, 2 * reader.rows, 4)]
    rows = np.concatenate(batches)[: 2 * reader.rows]
    assert rows.dtype == np.int32
    assert (np.diff(rows) == 1).all()
    first, second = np.sort(rows[: reader.rows, 0]), np.sort(rows[reader.rows :, 0])
    assert (np.diff(first) == 10).all()
    assert (np.diff(second) == 10).all()
    assert rows[: reader.rows, 0].tolist() != first.tolist()
    assert first[0] != second[0]  # cut elsewhere
    # From the position alone, whatever was read before.
    again = example.Reader(text, length=10, seed=3)
    for i in (5, 2, 7):
        np.testing.assert_array_equal(again.batch(4 * i, 4), batches[i])


def test_the_text_is_python_and_held_out_files_are_not_in_it(example):
    train, held_out = example.load_text()
    assert len(train) > 5 * len(held_out) > 1_000_000
    for name in ("__init__.py", "decoder.py", "encoder.py", "scanner.py"):
        source = Path(json.__file__).with_name(name).read_bytes()
        assert (source in train.tobytes()) != (source in held_out.tobytes())


def test_the_bigram_loss_is_that_of_counts(example):
    text, rows = np.frombuffer(b"abababac", np.uint8), np.array([[97, 98, 97], [99, 97, 99]])
    # Of the 4 bytes after an a, 3 are b; of the 3 after a b all are a; nothing comes after c; one more of each.
    shares = [[4 / 260, 4 / 259], [1 / 256, 2 / 260]]
    assert example.bigram_loss(text, rows) == pytest.approx(-np.log(shares).mean())


# As processes, which can be killed --------------------------------------------------------------------------------

LONG = [*SIZES, "--policy", "mixed_float16", "--steps", "480", "--save-every", "4"]
SHORT = [*SIZES, "--policy", "float32", "--steps", "60", "--save-every", "4"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the example with one CPU device and flags; what it prints goes to a file beside its directory."""
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    left = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}

    def start(directory, *flags, before=()):
        command = [*before, sys.executable, str(PATH), "--directory", str(directory), *flags]
        with directory.with_suffix(".log").open("a") as log:
            return subprocess.Popen(command, env=left | compiled, stdout=log, stderr=subprocess.STDOUT)

    return start


def printed(directory):
    log = directory.with_suffix(".log")
    return log.read_text() if log.exists() else ""


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """The directories of runs that nothing stopped."""

    def run(name, flags):
        directory = tmp_path_factory.mktemp("uninterrupted") / name
        assert start(directory, *flags).wait() == 0, printed(directory)
        return directory

    return {"long": run("long", LONG), "short": run("short", SHORT)}


def wait_until(happened, process, directory):
    while not happened():
        assert process.poll() is None, printed(directory)
        time.sleep(0.001)


def saves(directory):
    """The saves that are under way, or were when the process was killed."""
    return set((directory / "checkpoints").glob("*tmp*"))


def newest(directory):
    """The step of the last complete checkpoint, or 0."""
    return max(kept(directory), default=0) if (directory / "checkpoints").exists() else 0


@pytest.mark.slow
def test_twenty_kills_change_no_bit(start, uninterrupted, tmp_path, record_property):
    """SIGKILL at moments drawn at random: on the way up, after the restore, in steps, and in the middle of saves."""
    directory, draw = tmp_path / "run", random.Random(0)
    during_saves = resumed = 0
    for kill in range(20):
        before, old, said = newest(directory), saves(directory), printed(directory)
        # Where to wait, and for how many seconds more.
        moment, seconds = (("start", 1.5), ("said", 0.5), ("step", 0.3), ("save", 0.03), ("save", 0.1))[kill % 5]
        more = 4 * draw.randrange(3)
        happened = {
            "start": lambda: True,
            "said": lambda: printed(directory) != said,  # noqa: B023
            "step": lambda: newest(directory) >= before + more,  # noqa: B023
            "save": lambda: newest(directory) >= before + more and saves(directory) - old,  # noqa: B023
        }[moment]
        process = start(directory, *LONG)
        wait_until(happened, process, directory)
        time.sleep(draw.uniform(0, seconds))
        assert process.poll() is None, printed(directory)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        during_saves += bool(saves(directory) - old)
        resumed += before > 0
    assert start(directory, *LONG).wait() == 0, printed(directory)
    counts = f"20 kills, {during_saves} during a save, {resumed} with a checkpoint to go on from"
    record_property("counts", counts)
    assert during_saves >= 2, counts
    assert resumed >= 12, counts
    same_run(directory, uninterrupted["long"], 480)
    assert not saves(directory)
    assert kept(directory) == [472, 476, 480]


@pytest.mark.slow
def test_sigterm_ends_a_process_well(start, uninterrupted, tmp_path):
    directory = tmp_path / "run"
    process = start(directory, *SHORT)
    wait_until(lambda: newest(directory), process, directory)
    process.terminate()
    assert process.wait() == 0, printed(directory)
    step = newest(directory)
    assert step < 60
    assert lines(directory)[-1]["step"] == step
    assert f"stopped after step {step}, which is saved in" in printed(directory)
    assert start(directory, *SHORT).wait() == 0, printed(directory)
    assert f"going on after step {step}" in printed(directory)
    same_run(directory, uninterrupted["short"], 60)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(start, uninterrupted, tmp_path):
    """A file system in memory with room for two checkpoints, which gets more room after the first run."""
    mount = ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a file system of their own")
    directory, copy = tmp_path / "run", tmp_path / "copy"
    script = f"""
        mount -t tmpfs -o size=6m none "{directory}" || exit 3
        "$@" && exit 4
        ls "{directory}/checkpoints" && df "{directory}"
        mount -o remount,size=99m "{directory}"
        "$@" && cp -r "{directory}" "{copy}"
    """
    directory.mkdir()
    assert start(directory, *SHORT, before=[*mount, "sh", "-c", script, "sh"]).wait() == 0, printed(directory)
    assert "The checkpoint of step 12 could not be written" in printed(directory)
    assert "The last good one is of step 8. Make room" in printed(directory)
    assert "going on after step 8" in printed(directory)
    same_run(copy, uninterrupted["short"], 60)


@pytest.mark.slow
def test_two_processes_do_what_one_does(start, uninterrupted, tmp_path):
    """Stopped by a signal to one of them, and gone on with."""
    directory = tmp_path / "run"

    def start_both():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        ends = ["--coordinator", address, "--processes", "2", "--process"]
        return [start(directory, *SHORT, *ends, str(i)) for i in range(2)]

    both = start_both()
    wait_until(lambda: newest(directory), both[0], directory)
    both[1].terminate()
    assert [process.wait() for process in both] == [0, 0], printed(directory)
    assert newest(directory) in (10, 20, 30, 40, 50)
    assert f"stopped after step {newest(directory)}" in printed(directory)
    assert [process.wait() for process in start_both()] == [0, 0], printed(directory)
    assert "over {'data': 2, 'model': 1}" in printed(directory)
    for a, b in zip(lines(directory), lines(uninterrupted["short"]), strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
