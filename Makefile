# Everything anybody needs to do with a checkout. On a fresh machine with Python >= 3.11 and make, each target is the
# only command needed: it creates .venv and installs what constraints.txt pins.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 0
BENCHES ?= engine spans tasks latency read reopen memory gateway tracing
PYTEST_FLAGS ?= -n auto --maxprocesses 8

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow simulate check format bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

demo: $(VENV)/.stamp  ## train the calculator agent from random weights, about five minutes (SEED=n)
	$(BIN)/lightning-bus demo --seed $(SEED)

test: $(VENV)/.stamp  ## the default tests: about two minutes, no GPU
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-slow: $(VENV)/.stamp  ## the tests that take long or kill processes
	$(BIN)/python -m pytest -m "(slow or crash) and not gpu"  # one at a time: they measure and they kill

simulate: $(VENV)/.stamp  ## 20,000 seeded histories of the bus, every promise checked, about ten minutes
	$(BIN)/python -m tests.simulation.run --seeds 20000 --jobs 2

check: $(VENV)/.stamp  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.stamp  ## put the code into the one format
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

bench: $(VENV)/.stamp  ## every benchmark, against peers that it installs into .bench; each prints one JSON object last
	@$(BIN)/python -m bench.install
	@for n in $(BENCHES); do echo "bench.$$n"; $(BIN)/python -m bench.$$n --json || exit 1; done

clean:  ## remove .venv, .bench and caches; runs/ stays
	rm -rf $(VENV) .bench .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment, made again when what it should hold changes.
$(VENV)/.stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "lightning-bus needs Python >= 3.11 and found none on PATH." \
		"Install one, or say where it is: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot create a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,examples,fast,dev]'
	@touch $@
