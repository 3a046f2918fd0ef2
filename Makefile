# `make demo` and `make test` need nothing but a Python 3.11 or 3.12; each installs what it uses into its own .venv.

PYTHON ?= python3
PYTEST_ARGS ?=

.PHONY: demo test test-slow test-newest lint format docs bench clean

demo: .venv/demo
	.venv/bin/mpjax demo

test: .venv/dev
	.venv/bin/python -m pytest -q -n auto -m "not slow" $(PYTEST_ARGS)

test-slow: .venv/dev
	.venv/bin/python -m pytest -q -n auto -m slow $(PYTEST_ARGS)

test-newest: .venv-newest/dev
	.venv-newest/bin/python -m pytest -q -n auto -m "not slow" $(PYTEST_ARGS)

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build

bench: .venv/dev .venv-bench/dev .venv-bench-gpu/dev
	.venv/bin/python benchmarks/half_weights.py --write
	.venv-bench/bin/python benchmarks/step_cost.py --write
	.venv-bench/bin/python benchmarks/weights_cost.py --target v5e --write
	.venv-bench/bin/python benchmarks/autocast_cost.py --target v5e --write
	.venv-bench/bin/python benchmarks/wire_bytes.py --write
	.venv-bench/bin/python benchmarks/large_slice.py --write
	.venv-bench/bin/python benchmarks/model_costs.py --target v5e --search --write
	.venv-bench/bin/python benchmarks/model_costs.py --target v6e --write
	.venv-bench/bin/python benchmarks/autocast_trace.py --write
	.venv-bench-gpu/bin/python benchmarks/autocast_cost.py --target h100 --write
	.venv-bench-gpu/bin/python benchmarks/weights_cost.py --target h100 --write
	.venv-bench-gpu/bin/python benchmarks/fp8_hlo.py --write
	.venv-bench-gpu/bin/python benchmarks/model_costs.py --target h100 --search --write
	.venv/bin/python benchmarks/fp8_convergence.py --steps 500 --seeds 3 --write
	.venv/bin/python benchmarks/convergence.py --write

clean:
	rm -rf .venv .venv-newest .venv-bench .venv-bench-gpu .pytest_cache .mypy_cache .ruff_cache .hypothesis out site

# Each stamp is remade when pyproject.toml changes.
.venv/demo: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install -q --disable-pip-version-check -e ".[examples]"
	touch $@

.venv/dev: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	touch $@ .venv/demo

.venv-newest/dev: pyproject.toml
	"$$(.ci/find-python 3.12)" -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q --disable-pip-version-check --upgrade -e ".[dev]"
	touch $@

.venv-bench/dev: pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install -q --disable-pip-version-check -e ".[aot-tpu]"
	touch $@

# Its own environment: the compilers for TPUs and for GPUs are never to be in one process. 5.5 GB.
.venv-bench-gpu/dev: pyproject.toml
	$(PYTHON) -m venv .venv-bench-gpu
	.venv-bench-gpu/bin/python -m pip install -q --disable-pip-version-check -e ".[aot-gpu]"
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv
