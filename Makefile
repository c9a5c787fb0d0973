# Each target does its own set-up: on a fresh clone `make demo` and `make test` need nothing before them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN ?= runs/demo
PYTEST_ARGS ?= -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test soak lint types check bench zoo clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch first and alone: its pinned build is then what every other requirement finds already installed.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	@touch $@

$(VENV)/.all: pyproject.toml $(VENV)/.torch
	$(PIP) install --quiet --constraint constraints.txt --editable ".[all]"
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@ $(VENV)/.all

demo: $(VENV)/.all ## the whole recipe on the tiny zoo: groups, selects, merges, routes, reports (minutes, CPU)
	$(BIN)/modelglue demo $(RUN)

test: $(VENV)/.dev ## the test suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

soak: $(VENV)/.dev ## the long versions of the kill, fuzz and load tests (about an hour)
	$(BIN)/python -m pytest -m soak -o addopts="" -v -s tests/soak

lint: $(VENV)/.dev ## ruff, as CI runs it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## mypy in strict mode
	$(BIN)/mypy

check: lint types test ## all that CI checks

bench: $(VENV)/.dev ## merge against copying the same bytes
	$(BIN)/python benchmarks/merge.py

zoo: $(VENV)/.all ## train the tiny zoo again from scratch
	$(BIN)/python examples/tiny-zoo/train.py

clean: ## remove the environment and everything that was made
	rm -rf $(VENV) runs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
