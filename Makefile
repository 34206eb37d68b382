# Each target does its own set-up: a virtual environment in $(VENV), made from this checkout.
# PIP_CONSTRAINT (a file of pip constraints) is honoured, for instance to hold torch at one version.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The frameworks have an environment of their own: what they want of each other is not wanted here.
FRAMEWORKS ?= .venv-frameworks
# The release the tests are run with. Any from 2.6 on will do: make TORCH='torch>=2.6' test
TORCH ?= torch==2.13.0

.PHONY: demo demo-resume test test-fast test-frameworks test-versions bench lint types docs mutation clean

# torch comes first and alone, so that no other package chooses its build.
$(VENV)/base: setup.cfg pyproject.toml
	@echo "Setting up $(VENV), once: PyTorch takes a minute or two."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --quiet -e '.[examples,run,report,cli]'
	touch $@

$(VENV)/dev: $(VENV)/base
	$(BIN)/python -m pip install --quiet -e '.[test,notebook,lint,bench,examples,lightning,parquet,cli]'
	touch $@

$(VENV)/docs: $(VENV)/base
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

$(VENV)/mutation: $(VENV)/dev
	$(BIN)/python -m pip install --quiet -e '.[mutation]'
	touch $@

# torch is held where it is. timm needs torchvision, whose wheels on PyPI are built for CUDA: beside
# a torch without it they cannot be imported as they are, and whatever sees one installed tries to.
# So these two lie in a folder that only timm's program has on its path, without what they depend
# on: torch and NumPy are there, and the rest comes with transformers and the tests.
$(FRAMEWORKS)/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --upgrade pip
	$(FRAMEWORKS)/bin/python -m pip install --quiet '$(TORCH)'
	$(FRAMEWORKS)/bin/python -m pip install --quiet '$(TORCH)' -e '.[test,frameworks]'
	aside=$$($(FRAMEWORKS)/bin/python -c \
	    'import sysconfig; print(sysconfig.get_path("purelib") + "/aside")') && \
	    rm -rf "$$aside" && \
	    $(FRAMEWORKS)/bin/python -m pip install --quiet --no-deps --target "$$aside" timm torchvision
	touch $@

# Real digits with two faults in them: what torch's loader makes of it, and what ours does.
demo: $(VENV)/base
	@$(BIN)/python examples/demo.py

# A training that is killed and goes on: bit for bit the same.
demo-resume: $(VENV)/base
	$(BIN)/python examples/resume.py

# All tests, with coverage: about 45 minutes on two cores that have nothing else to do.
test: $(VENV)/dev
	$(BIN)/python -m tests.run

# What needs one process and no long time: under a minute.
test-fast: $(VENV)/dev
	$(BIN)/python -m pytest --one-process -m 'not slow and not lightning'

# Programs with the real frameworks, each with us and without: half an hour on two cores.
test-frameworks: $(FRAMEWORKS)/ready
	$(FRAMEWORKS)/bin/python -m pip list --format=freeze
	$(FRAMEWORKS)/bin/python -m pytest --need-frameworks -m frameworks tests/frameworks

# Every Python and torch that is claimed, each pair in an environment of its own (some GB, removed
# after its run): minutes each. What came of it is docs/versions.csv.
test-versions:
	$(PYTHON) -m tests.versions --remove

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks.run

lint: $(VENV)/dev
	$(BIN)/ruff check safeloader tests benchmarks examples
	$(BIN)/ruff format --check safeloader tests benchmarks examples

types: $(VENV)/dev
	$(BIN)/mypy

# The reference of the public names, from their docstrings; warnings are errors.
docs: $(VENV)/docs
	$(BIN)/python -m sphinx -W --keep-going --quiet -E -b html docs docs/_build/html

# Mutants of the pure modules, and who survives; `[tool.mutmut]` in pyproject.toml says which. Each
# runs in a fork of one process: the threads of torch's sums are not there, and would be waited for.
mutation: $(VENV)/mutation
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/mutmut run
	$(BIN)/mutmut results

clean:
	rm -rf $(VENV) $(FRAMEWORKS) .coverage* build docs/_build mutants *.egg-info
