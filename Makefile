# make run: the quickstart benchmark; make test: the linters and the quick tests; make test-slow: the tests that are marked slow.
# CI runs make test, then make test-slow. make test-nodes: clusters of several nodes, and what losing
# them costs; every task killed and carried on, of which make test-slow has one a kind; what takes a detector, a search or a driver minutes.
# make test-shuffled: the tests of both in random order (SEED=1 repeats an order; TESTS=tests/data runs a part).
# PYTHON_FLAGS="-X dev" runs any of these with Python's development mode.
# make bench: how fast kdbench is (ARGS=--quick, --only a,b, --help).
# All make the environment first if it is not there.
PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/.ready
PYTEST = $(VENV)/bin/python $(PYTHON_FLAGS) -m pytest
IN_PARALLEL := --numprocesses 3 --dist loadfile --no-loadscope-reorder
SHUFFLE := $(VENV)/shuffle
# Where a machine keeps no bytecode, each of the hundreds of processes that the tests start would compile kdbench and the tests anew.
unexport PYTHONDONTWRITEBYTECODE
SEED ?= $(shell date +%s)
TESTS ?= tests

.PHONY: run test test-slow test-nodes test-shuffled bench lint format clean

run: $(READY)
	$(VENV)/bin/kdbench run experiments/quickstart.yaml

test: $(READY) lint
	$(PYTEST) $(IN_PARALLEL) -m "not nodes and not slow"

test-slow: $(READY)
	$(PYTEST) $(IN_PARALLEL) -m "slow and not nodes"

test-nodes: $(READY)
	$(PYTEST) -m nodes

# The plugin is kept apart, so that no other run of the tests loads it. The seed is printed, and again by pytest.
test-shuffled: $(READY) $(SHUFFLE)
	PYTHONPATH=$(SHUFFLE) $(PYTEST) --random-order --random-order-seed=$(SEED) $(IN_PARALLEL) -m "not nodes" $(TESTS)

bench: $(READY)
	$(VENV)/bin/python -m benchmarks $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy kdbench benchmarks tests

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kdbench needs Python 3.11 or newer; name one with make PYTHON=python3.11"; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no virtual environment could be made; on Debian: apt-get install python3-venv"; exit 1; }
	@echo "Installing what constraints.txt pins into $(VENV): a few minutes, once"
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

$(SHUFFLE): $(READY)
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(SHUFFLE) pytest-random-order==1.2.0

clean:
	rm -rf $(VENV)
