"""Several processes with collectives between them: the run of one device, and a death in the middle of a step."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import lm_run
import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.standard_promotion, pytest.mark.usefixtures("quick_compiles")]

WORKER = Path(__file__).with_name("multiprocess_worker.py")
# Seconds that a process may hang before its test fails. None comes near it: the worker has JAX notice a death in 20.
SAFETY_NET = 600
JOBS = [
    *(f"mixed_float16,{layout}" for layout in lm_run.LAYOUTS if layout != "shard_map unchecked"),
    "mixed_bfloat16,data",
    "float32,data",
]


class Job:
    """The processes of one job on this machine, each with some CPU devices; what they print goes to files."""

    def __init__(self, directory, mode, processes, devices=1, victim=None, die_at=None, flags=()):
        directory.mkdir(exist_ok=True)
        self.directory, self.logs = directory, [directory / f"{i}.log" for i in range(processes)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        command = [sys.executable, WORKER, mode, "--address", address, "--processes", processes]
        command += ["--directory", directory, *flags]
        self.processes = []
        for i, path in enumerate(self.logs):
            own = ["--process", i, *(["--die-at", die_at] if i == victim else [])]
            with path.open("w") as log:
                self.processes.append(
                    subprocess.Popen([*map(str, command + own)], env=environment, stdout=log, stderr=subprocess.STDOUT)
                )

    def ends(self):
        """Exit statuses, once all have ended."""
        try:
            return [process.wait(SAFETY_NET) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()

    def found(self):
        """What each process found, once all have ended well."""
        statuses = self.ends()
        assert statuses == [0] * len(statuses), self.printed()
        whole = [json.loads((self.directory / f"{i}.json").read_text()) for i in range(len(statuses))]
        assert {one["processes"] for one in whole} == {len(statuses)}
        return [one["found"] for one in whole]

    def printed(self):
        return "\n".join(path.read_text() for path in self.logs)


@pytest.fixture(scope="module")
def alone():
    """Losses and history of the run on one device, by policy."""
    found = {}
    for policy in lm_run.HISTORY:
        one = lm_run.Run(policy)
        state, losses, history = one.start(), [], []
        for batch in lm_run.batches():
            state, loss = one.advance(state, batch)
            losses.append(loss)
            history.append(list(lm_run.scale_and_skips(state)))
        found[policy] = losses, history
    return found


def merged(digests):
    """The different digests of each part of the state, over all processes that have it."""
    together = {}
    for own in digests:
        for name, different in own.items():
            together.setdefault(name, set()).update(different)
    return together


@pytest.mark.parametrize(("processes", "devices"), [(2, 1), (2, 2), (4, 1)])
def test_the_run_of_one_device(alone, tmp_path, processes, devices):
    found = Job(tmp_path, "parity", processes, devices, flags=["--jobs", *JOBS]).found()
    for job in JOBS:
        policy, layout = job.split(",")
        losses, history = alone[policy]
        runs = [one[job] for one in found]
        assert [one["history"] for one in runs] == [history] * processes
        assert all(one["losses"] == runs[0]["losses"] for one in runs)
        np.testing.assert_allclose(runs[0]["losses"], losses, rtol=max(4 * lm_run.ROUNDING[policy], 2e-6))

        # The inf was in the rows of one process (which two of them have, where a matrix is cut over two).
        here = np.array([one["overflows_here"] for one in runs])
        assert here.any(0).nonzero()[0].tolist() == [lm_run.INF_STEP]
        assert here.sum() == (2 if layout == "tensor" and devices == 1 else 1)

        assert {len(different) for different in merged(one["digests"] for one in runs).values()} == {1}


@pytest.mark.parametrize(("processes", "victim"), [(4, 2), (2, 0)], ids=["one of four", "the coordinator"])
def test_a_death_in_the_middle_of_a_step(tmp_path, processes, victim):
    """SIGKILL before the process has handed in its gradients: the others end, and the next job goes on exactly."""
    whole = Job(tmp_path / "whole", "checkpoints", processes).found()
    killed = Job(tmp_path / "killed", "checkpoints", processes, victim=victim, die_at=7)
    statuses = killed.ends()
    assert statuses[victim] == -signal.SIGKILL
    for i, (status, path) in enumerate(zip(statuses, killed.logs, strict=True)):
        if i != victim:
            assert status not in (0, -signal.SIGKILL)
            assert re.search("another task died|Gloo all-reduce failed", path.read_text()), path.read_text()
    assert not list((tmp_path / "killed").glob("*.json"))

    resumed = Job(tmp_path / "killed", "checkpoints", processes).found()
    assert [one["first"] for one in whole] == [0] * processes
    assert [one["first"] for one in resumed] == [4] * processes
    assert whole[0]["history"] == resumed[0]["history"] == [256.0, 2]
    for jobs in (whole, resumed):
        assert {len(different) for different in merged(one["digests"] for one in jobs).values()} == {1}
    assert whole[0]["digests"] == resumed[0]["digests"]
