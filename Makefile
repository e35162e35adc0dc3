# make run: the quickstart benchmark; make test: what CI runs; make test-nodes: clusters of several nodes, and what losing them costs;
# make bench: how fast kdbench is (ARGS=--quick, --only a,b, --help).
# All make the environment first if it is not there.
PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/.ready

.PHONY: run test test-nodes bench lint format clean

run: $(READY)
	$(VENV)/bin/kdbench run experiments/quickstart.yaml

test: $(READY) lint
	$(VENV)/bin/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-nodes: $(READY)
	$(VENV)/bin/python -m pytest -m nodes

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

clean:
	rm -rf $(VENV)
