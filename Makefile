# `make demo` and `make test` make .venv if there is none, install into it, and run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all lint

demo: $(INSTALLED)
	$(BIN)/linearize demo --force

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow" --durations=10

test-all: $(INSTALLED) lint
	$(BIN)/python -m pytest -n 2 --dist loadscope

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@
