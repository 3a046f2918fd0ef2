"""notebooks/: each runs from its first cell to its last, at a small size, and is kept without its outputs."""

import ast
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_some():
    assert NOTEBOOKS


@each_notebook
def test_kept_as_it_should_be(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert cell.metadata == {}
        assert cell.source.strip()
        assert not re.search(r"/(home|root|tmp|work|Users|mnt|opt)/", cell.source)
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
    assert 'pip install "mpjax[examples]"' in notebook.cells[0].source
    for source in code_of(notebook):
        ast.parse(re.sub("^%", "# %", source, flags=re.MULTILINE))
    assert "MPJAX_NOTEBOOK_STEPS" in "\n".join(code_of(notebook))


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """The name of a kernel that is this very interpreter, whatever kernels and settings the user has."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = tmp_path / "JUPYTER_DATA_DIR" / "kernels" / "this" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": argv, "display_name": "this", "language": "python"}))
    return "this"


@pytest.mark.slow
@each_notebook
def test_it_runs(path, kernel, tmp_path, monkeypatch):
    """Without a warning, and with pictures."""
    monkeypatch.setenv("MPJAX_NOTEBOOK_STEPS", "24")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, kernel_name=kernel, timeout=600, resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert any("image/png" in output.get("data", {}) for output in outputs)
