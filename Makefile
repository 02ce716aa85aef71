# DreamQuant. `make` alone lists what can be made.

PYTHON ?= python3
JOBS ?= 2
# PyTorch's own index of builds for the processor; used where it answers, so that no CUDA libraries are downloaded.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
STAMP := .venv/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test bench-quick check format clean

help: ## list what can be made
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: $(STAMP) ## make .venv with everything that the other targets need

demo: $(STAMP) ## quantize the digits network without data, three ways, and show what is left of its accuracy
	@$(BIN)/python examples/demo.py

test: $(STAMP) ## run the tests
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

bench-quick: $(STAMP) ## measure a row of docs/benchmarks.md again, on the network that ships with the project
	@$(BIN)/python -m benchmarks.run --suite digits --again --only auto

check: $(STAMP) ## style, types, and that the data flows one way
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## put imports and lines in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and results
	rm -rf .venv runs .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; $(PYTHON) is " + sys.version)'
	@echo "installing into .venv; this takes a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@if $(BIN)/python -c 'from urllib.request import urlopen as u; u("$(TORCH_INDEX)/torch/", timeout=5)' 2>/dev/null; \
		then $(PIP) --extra-index-url $(TORCH_INDEX) $(TORCH); else $(PIP) $(TORCH); fi
	@$(PIP) --editable '.[dev]'
	@touch $@
