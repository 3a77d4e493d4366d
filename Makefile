# Every target is a line that a person could type. `make demo` and `make test` set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
TEST_ARGS ?=
TORCH ?= torch==2.13.0

export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-all test-compose check format protos protos-check clean

setup: $(VENV)/.ready

$(VENV)/.ready: constraints.txt requirements-dev.txt client/pyproject.toml server/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "adashard needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e client -e server -r requirements-dev.txt
	touch $@

demo: setup
	$(BIN)/adashard demo $(DEMO_ARGS)

test: setup
	$(BIN)/python -m pytest -m "not slow" $(TEST_ARGS)

test-all: setup
	$(BIN)/python -m pytest $(TEST_ARGS)

test-compose:
	docker/test-compose.sh

check: setup protos-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/house

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: .venv-protoc/.ready
	protos/generate.sh client/src

protos-check: .venv-protoc/.ready
	protos/check.sh

.venv-protoc/.ready: protos/requirements.txt
	test -x .venv-protoc/bin/python || $(PYTHON) -m venv .venv-protoc
	.venv-protoc/bin/python -m pip install --quiet --disable-pip-version-check -r protos/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-protoc
