# Each target does its own set-up: a virtual environment in $(VENV), made from this checkout.
# PIP_CONSTRAINT (a file of pip constraints) is honoured, for instance to hold torch at one version.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The release the tests are run with. Any from 2.6 on will do: make TORCH='torch>=2.6' test
TORCH ?= torch==2.13.0

.PHONY: demo test test-fast bench lint types clean

# torch comes first and alone, so that no other package chooses its build.
$(VENV)/base: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet -e '.[examples]'
	touch $@

$(VENV)/dev: $(VENV)/base
	$(BIN)/python -m pip install --quiet -e '.[test,lint,bench,examples,lightning,parquet]'
	touch $@

demo: $(VENV)/base
	$(BIN)/python examples/train_digits.py

test: $(VENV)/dev
	$(BIN)/python -m tests.run

test-fast: $(VENV)/dev
	$(BIN)/python -m pytest -m 'not slow and not lightning'

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks.run

lint: $(VENV)/dev
	$(BIN)/ruff check safeloader tests benchmarks examples
	$(BIN)/ruff format --check safeloader tests benchmarks examples

types: $(VENV)/dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .coverage* build *.egg-info
