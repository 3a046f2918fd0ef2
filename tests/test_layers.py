"""The order of the files: each imports only from rows above it, and heavy packages stay out of `import mpjax`."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mpjax

PACKAGE = Path(mpjax.__file__).parent

# A file imports only from rows above its own; cli imports everything and nothing imports it.
ROWS = [
    ["_compat", "_typing", "_errors"],
    ["_dtypes", "_state", "_path_patterns"],
    ["_tree"],
    ["_hardware", "_loss_scale"],
    ["_dynamic_loss_scale", "_policy_grammar", "_overrides"],
    ["_convert", "_apply_to"],
    ["_policy", "_grad", "_read_loss_scale"],
    ["fp8._formats"],
    ["fp8._scaling", "fp8._recipe"],
    ["fp8._markers"],
    ["fp8._dot", "_accumulate"],
    ["fp8"],
    ["_autocast._marks", "_autocast._tables", "_autocast._regions"],
    ["_autocast._rules"],
    ["_autocast._reads", "_autocast._context", "_autocast._softmax", "_autocast._weights"],
    ["_autocast._patterns", "_autocast._ahead"],
    ["_autocast._decide"],
    ["_autocast._interpreter"],
    ["_autocast._higher_order"],
    ["_autocast._custom_rules"],
    ["_autocast._autocast"],
    ["_autocast"],
    ["transforms._norm", "transforms._stored", "transforms._rounding", "transforms._blockwise"],
    ["transforms._skip_on_overflow", "transforms._half_weights", "transforms._state_rules"],
    ["transforms._loss_scaled", "transforms._kahan", "transforms._master_weights", "transforms._stochastic_rounding"],
    ["transforms._params_ema", "transforms._state_dtypes"],
    ["transforms", "diagnostics._explanation", "diagnostics._flops", "diagnostics._tree_stats"],
    ["diagnostics._place", "diagnostics._traced"],
    ["diagnostics._explain", "diagnostics._state_kinds", "diagnostics._gradient_monitor"],
    ["diagnostics._taps", "diagnostics._located", "diagnostics._worlds"],
    ["diagnostics._memory", "diagnostics._summary_value", "diagnostics._amax", "diagnostics._reasons"],
    ["diagnostics._advice", "diagnostics._origins"],
    ["diagnostics._widened", "diagnostics._pairs", "fp8._places"],
    ["fp8._delayed"],
    ["diagnostics._fp8_report"],
    ["diagnostics._sites"],
    ["diagnostics._search", "diagnostics._paired"],
    ["diagnostics._measured", "diagnostics._comparison"],
    ["diagnostics._exemptions"],
    ["diagnostics._compare"],
    ["diagnostics._summary", "diagnostics._locate"],
    ["diagnostics._logging"],
    ["diagnostics", "nnx._autocast", "nnx._grad"],
    ["nnx", "linen"],
    ["aot._hlo", "aot._targets"],
    ["aot._devices", "aot._traffic", "aot._work"],
    ["aot._arguments", "aot._report"],
    ["aot._comparison"],
    ["aot._compile"],
    ["aot"],
    ["plots._house"],
    ["plots._loss_scale", "plots._exponent_histogram", "plots._underflow_heatmap"],
    ["plots._error_bars", "plots._memory_bars"],
    ["plots"],
    [""],
    ["cli"],
]
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def module_name(path):
    name = ".".join(path.with_suffix("").parts)
    return name.removesuffix("__init__").removesuffix(".")


def row_of(module):
    if module.split(".")[0] == "cli":
        return len(ROWS) - 1
    for i, row in enumerate(ROWS):
        if module in row:
            return i
    raise AssertionError(f"mpjax/{module} is in no row of the layer table in {__file__}")


def imported_modules(path):
    """Modules of mpjax that a file imports, `from mpjax.a import b` being a.b where that is a module."""
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = []
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                inside = PACKAGE / Path(*full.split(".")[1:])
                is_module = full.startswith("mpjax.") and (inside.with_suffix(".py").exists() or inside.is_dir())
                names.append(full if is_module else node.module)
        else:
            continue
        for name in names:
            if name == "mpjax" or name.startswith("mpjax."):
                yield name.removeprefix("mpjax").removeprefix(".")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_downward(path):
    me = module_name(path)
    for other in imported_modules(path):
        if me.split(".")[0] == other.split(".")[0] == "cli":
            continue
        assert row_of(other) < row_of(me), f"mpjax/{path} imports {other or 'mpjax'}, which is not in a row above it"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_stay_short(path):
    assert len((PACKAGE / path).read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "_compat.py"], ids=str)
def test_jax_internals_only_in_compat(path):
    text = (PACKAGE / path).read_text()
    found = re.findall(r"jax\._src|jax\.interpreters|jax\.extend|jax\.core|jax\.__version|JAX_GE", text)
    assert not found


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] != "cli"], ids=str)
def test_only_cli_imports_flax(path):
    """The command's demo trains a Flax model; the library needs none of these."""
    tree = ast.parse((PACKAGE / path).read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = [getattr(n, "module", None) or "" for n in imports] + [a.name for n in imports for a in n.names]
    found = {name.split(".")[0] for name in names} & {"flax", "matplotlib", "rich", "sklearn"}
    assert found <= ALLOWED.get(str(path), set())


# Flax's own rooms, which `import mpjax` does not open; a table that rich prints when it is asked to.
ALLOWED = {name: {"flax"} for name in ("linen.py", "nnx/_autocast.py", "nnx/_grad.py")}
ALLOWED |= {f"diagnostics/_{name}.py": {"rich"} for name in ("explanation", "memory", "comparison", "fp8_report")}
# Inside of functions: `import mpjax.plots` needs no matplotlib.
ALLOWED |= {str(p): {"matplotlib"} for p in FILES if p.parts[0] == "plots"}


@pytest.mark.parametrize("module", ["mpjax", "mpjax.plots", "mpjax.cli"])
def test_import_leaves_heavy_packages_out(module):
    code = (
        f"import sys, {module}; "
        "print([m for m in ('flax', 'matplotlib', 'rich', 'sklearn', 'haiku') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_documented_and_runnable():
    """Every public name has a docstring, and every function and class an example in it."""
    for name in dir(mpjax):
        thing = getattr(mpjax, name)
        if name.startswith("_") or not callable(thing):
            continue
        assert thing.__doc__, name
        # The abstract base has no use of its own; its three members show it.
        assert ">>>" in thing.__doc__ or name == "LossScale", f"mpjax.{name} has no example"
    for room in (mpjax.transforms, mpjax.fp8, mpjax.nnx, mpjax.linen, mpjax.plots):
        for name, thing in vars(room).items():
            ours = callable(thing) and getattr(thing, "__module__", "").startswith(room.__name__)
            if not name.startswith("_") and ours:
                assert thing.__doc__, name
                assert ">>>" in thing.__doc__ or name.endswith("State"), f"{room.__name__}.{name} has no example"
