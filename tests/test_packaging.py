"""What is installed and what `import mpjax` loads; the wheel, the sdist, and the workflow that GitHub runs."""

import email
import os
import pickle
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import mpjax as mp

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
ROOMS = ("aot", "diagnostics", "linen", "nnx", "plots")


def python(code, *args, cwd=ROOT):
    """What a fresh process prints, in words; a package in the folder that it starts in comes before any other."""
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


class TestImport:
    def test_loads_nothing_else(self):
        """Beyond JAX and optax: jmp and the standard library. Not `jax.extend`, which imports all of Pallas."""
        code = "import sys, jax, optax; before = set(sys.modules); import mpjax; print(*(set(sys.modules) - before))"
        loaded = python(code)
        assert {name.split(".")[0] for name in loaded} - sys.stdlib_module_names == {"mpjax", "jmp"}
        assert not [name for name in loaded if name.split(".")[:2] in [["mpjax", room] for room in ROOMS]]
        assert "mpjax.fp8._delayed" not in loaded

    def test_rooms_open_when_they_are_named(self):
        code = (
            "import sys, mpjax as mp; print('mpjax.diagnostics' in sys.modules); mp.diagnostics.summary;"
            "from mpjax import aot, explain, plots; print('flax' in sys.modules, explain is mp.diagnostics.explain);"
            "import mpjax.nnx; print('flax' in sys.modules, mpjax.nnx is mp.nnx)"
        )
        assert python(code) == ["False", "False", "True", "True", "True"]

    def test_names_are_listed(self):
        assert {*ROOMS, "explain", "autocast", "fp8"} <= set(dir(mp))
        assert {"DelayedScaling", "delayed", "init", "Recipe"} <= set(dir(mp.fp8))
        for module in (mp, mp.fp8):
            with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'no_such'"):
                module.no_such  # noqa: B018

    def test_what_is_pickled_opens_its_room(self):
        code = "import sys, pickle; print(*(thing.__module__ for thing in pickle.loads(bytes.fromhex(sys.argv[1]))))"
        found = python(code, pickle.dumps((mp.explain, mp.diagnostics.summary)).hex())
        assert found == ["mpjax.diagnostics._explain", "mpjax.diagnostics._summary"]


class TestProject:
    def test_the_version_is_in_one_place(self):
        assert mp.__version__ == PROJECT["version"], "installed before the version changed: remove .venv/dev, make test"
        assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == PROJECT["version"]
        written = [path for path in (ROOT / "mpjax").rglob("*.py") if f'"{PROJECT["version"]}"' in path.read_text()]
        assert written == []

    def test_oldest_is_what_the_requirements_say(self):
        """CI's run with the oldest dependencies is with the lower bounds."""
        lines = (ROOT / ".github" / "oldest.txt").read_text().splitlines()
        pins = dict(line.split("==") for line in lines if not line.startswith("#"))
        lower = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in PROJECT["dependencies"])
        assert lower.keys() == {"jax", "flax", "optax", "jmp"}
        assert pins.keys() == {*lower, "jaxlib"}
        assert pins["jaxlib"] == pins["jax"]
        assert {name: pins[name] for name in lower} == {**lower, "jax": f"{lower['jax']}.0"}

    def test_python_versions(self):
        pattern = r"Programming Language :: Python :: 3\.(\d+)"
        minors = [int(match[1]) for line in PROJECT["classifiers"] if (match := re.fullmatch(pattern, line))]
        assert minors == [11, 12, 13]
        assert PROJECT["requires-python"] == f">=3.{minors[0]}"


def on_disk(*folders):
    """What is kept in some folders of the repository, as relative paths."""
    suffixes = {".py", ".md", ".ipynb", ".yml", ".txt", ".json", ".png", ".typed", ".css", ""}
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    kept = [path for path in found if path.suffix in suffixes and "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix() for path in kept}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder of a wheel, built from an sdist, by what is installed: nothing is downloaded."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
class TestBuild:
    def test_sdist(self, dist):
        """All that the tests need, so that they run from it."""
        name = f"mpjax-{PROJECT['version']}"
        with tarfile.open(dist / f"{name}.tar.gz") as archive:
            held = {member.removeprefix(f"{name}/") for member in archive.getnames()}
        folders = ("mpjax", "tests", "benchmarks", "docs", "examples", "notebooks", ".ci", ".github")
        assert on_disk(*folders) <= held
        others = held - on_disk(*folders)
        assert {path for path in others if "/" in path} == set()
        files = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"}
        assert others - {"PKG-INFO", ".gitignore", "mkdocs.yml"} == files

    def test_wheel(self, dist):
        name = f"mpjax-{PROJECT['version']}"
        with zipfile.ZipFile(dist / f"{name}-py3-none-any.whl") as archive:
            held = set(archive.namelist())
            metadata = email.message_from_bytes(archive.read(f"{name}.dist-info/METADATA"))
            commands = archive.read(f"{name}.dist-info/entry_points.txt").decode()
        info = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
        assert held == on_disk("mpjax") | {f"{name}.dist-info/{file}" for file in info}
        assert "mpjax/py.typed" in held
        assert (metadata["Name"], metadata["Version"]) == ("mpjax", PROJECT["version"])
        assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
        assert metadata["Requires-Python"] == PROJECT["requires-python"]
        assert metadata.get_all("Classifier") == PROJECT["classifiers"]
        required = metadata.get_all("Requires-Dist")
        names = {re.match(r"[\w-]+", line)[0] for line in required if "extra ==" not in line}
        assert names == {"jax", "flax", "optax", "jmp"}
        assert set(metadata.get_all("Provides-Extra")) == PROJECT["optional-dependencies"].keys()
        assert metadata.get_payload() == (ROOT / "README.md").read_text()
        assert shlex.split(commands) == ["[console_scripts]", "mpjax", "=", "mpjax.cli:main"]

    def test_what_is_in_the_wheel_runs(self, dist, tmp_path):
        with zipfile.ZipFile(dist / f"mpjax-{PROJECT['version']}-py3-none-any.whl") as archive:
            archive.extractall(tmp_path)
        code = (
            "import jax.numpy as jnp, mpjax as mp, mpjax.cli; mp.aot, mp.plots, mp.linen, mp.nnx, mp.fp8.delayed;"
            "print(mp.__file__, mp.explain(lambda x: x @ x, 'mixed_bfloat16')(jnp.ones((4, 4))).flops)"
        )
        file, *flops = python(code, cwd=tmp_path)
        assert Path(file).parent.parent == tmp_path
        assert flops == ["{'bfloat16':", "128}"]


class TestWorkflow:
    TEXT = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    WORKFLOW = yaml.safe_load(TEXT)
    JOBS = WORKFLOW["jobs"]

    def commands(self, job):
        return [step["run"] for step in self.JOBS[job]["steps"] if "run" in step]

    def actions(self, name):
        steps = [step for job in self.JOBS.values() for step in job["steps"]]
        return [step for step in steps if name in step.get("uses", "")]

    def test_runs_what_ci_runs(self):
        assert self.commands("test") == [".ci/run"]
        _, setup, _ = self.JOBS["test"]["steps"]
        assert setup["with"]["python-version"].split() == ["3.12", "3.11"]
        assert os.access(ROOT / ".ci" / "run", os.X_OK)

    def test_jobs(self):
        # YAML 1.1 reads the word "on" as true.
        assert self.WORKFLOW[True].keys() >= {"push", "pull_request", "schedule"}
        assert self.JOBS.keys() == {"test", "oldest", "docs", "nightly-jax"}
        assert "schedule" in self.JOBS["nightly-jax"]["if"]
        assert [name for name, job in self.JOBS.items() if job.get("continue-on-error")] == ["nightly-jax"]

    def test_what_it_names_exists(self):
        makefile = (ROOT / "Makefile").read_text()
        targets = [line.split()[1] for job in self.JOBS for line in self.commands(job) if line.startswith("make ")]
        assert {"test", "docs", "test-newest"} <= set(targets)
        for target in targets:
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
        constraint = self.JOBS["oldest"]["steps"][-1]["env"]["PIP_CONSTRAINT"]
        assert (ROOT / constraint.removeprefix("${{ github.workspace }}/")).is_file()

    def test_may_do_little(self):
        assert self.WORKFLOW["permissions"] == {"contents": "read"}
        assert not any("permissions" in job for job in self.JOBS.values())
        assert "secrets." not in self.TEXT
        assert "pull_request_target" not in self.TEXT
        for step in self.actions(""):
            assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"])
        assert [step["with"] for step in self.actions("checkout")] == [{"persist-credentials": False}] * len(self.JOBS)
