# Every target is a line that a person could type. `make demo` and `make test` set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO_ARGS ?=
TEST_ARGS ?=
SOAK_ARGS ?=
BENCH_ARGS ?=
FAULTS_ARGS ?=
SEEDS ?= 10000
# Files of tests are spread over so many processes; 0 for this one alone, to debug in.
TEST_PROCESSES ?= 2
# The release that everything is tested with; a line of options for pip may follow it.
TORCH ?= torch==2.13.0

# Demo and tests run several processes of torch on one machine; a thread per core in each is too many.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-all sim faults soak bench test-compose check format protos protos-check pages constraints clean

help: ## What can be made.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(VENV)/.ready ## The virtual environment .venv: both distributions, editable, pinned.

$(VENV)/.ready: constraints.txt requirements-dev.txt client/pyproject.toml server/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "adashard needs Python 3.11 or newer: make PYTHON=python3.12, say")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (PyTorch is large; this happens once) ..."
	@$(PIP) $(TORCH)
	@$(PIP) -c constraints.txt -e client -e server -r requirements-dev.txt
	@touch $@

demo: setup ## Train a small language model through a cluster of this machine. DEMO_ARGS='--steps 50'
	$(BIN)/adashard demo $(DEMO_ARGS)

test: setup ## The tests, without the slow ones. TEST_ARGS='tests/shard -x'
	$(BIN)/python -m pytest -m "not slow" -n $(TEST_PROCESSES) --dist loadfile $(TEST_ARGS)

test-all: setup ## All tests, also those that take minutes or gigabytes.
	$(BIN)/python -m pytest $(TEST_ARGS)

sim: setup ## Whole clusters of the decisions in virtual time, with faults. SEEDS=100000
	$(BIN)/python -m tests.sim --seeds $(SEEDS)

faults: setup ## Kills every process at every point of a step; the bits must stay. Takes 15 minutes.
	$(BIN)/python benchmarks/faults.py $(FAULTS_ARGS)

soak: setup ## A training whose processes are killed at random. SOAK_ARGS='--minutes 2'
	$(BIN)/python benchmarks/soak.py $(SOAK_ARGS)

bench: setup ## All benchmarks of speed, under 15 minutes. BENCH_ARGS='--only update'
	$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

test-compose: ## Builds the images and trains through the stack of docker-compose.yml.
	docker/test-compose.sh

check: setup protos-check ## Format, lint, types, import arrows, stubs, house rules.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache # the cache misses modules that came or went
	$(BIN)/python -m pytest tests/house

format: setup ## Formats the code, and repairs what the linter can.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: .venv-protoc/.ready ## Writes the stubs anew, after a change below protos/.
	protos/generate.sh client/src

protos-check: .venv-protoc/.ready ## Stubs are those of the protos; buf finds nothing wrong with them.
	protos/check.sh

.venv-protoc/.ready: protos/requirements.txt
	@test -x .venv-protoc/bin/python || $(PYTHON) -m venv .venv-protoc
	@.venv-protoc/bin/python -m pip install --quiet --disable-pip-version-check -r protos/requirements.txt
	@touch $@

pages: setup ## Writes the pages of docs/ that are made from code.
	$(BIN)/python tools/errors_page.py

constraints: ## Writes constraints.txt anew, with today's versions.
	PYTHON=$(PYTHON) TORCH="$(TORCH)" tools/freeze.sh

clean: ## Removes what the targets above have made.
	rm -rf $(VENV) .venv-protoc .mypy_cache .ruff_cache .pytest_cache .hypothesis protos/node_modules
