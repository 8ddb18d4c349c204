# `make demo` and `make test` make .venv if there is none, install into it, and run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all test-oldest gpu-check lint

demo: $(INSTALLED)
	$(BIN)/linearize demo --force

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow" --durations=10

test-all: $(INSTALLED) lint
	$(BIN)/python -m pytest -n 2 --dist loadscope

# On the oldest transformers that pyproject.toml allows: how models run, are converted and are verified.
test-oldest:
	test -d $(VENV)-oldest || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.17.0 -e ".[test]"
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist loadscope -m "not slow" tests/runtime tests/conversion/test_convert.py tests/verification

# In the environment at hand, whose torch belongs to the GPU. The results are in gpu-check/.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@
