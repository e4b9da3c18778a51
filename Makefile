# `make train` and `make test` need nothing before them: both set up a virtual environment first, once.
PYTHON ?= python3
VENV ?= .venv
VENV_PEERS ?= .venv-peers
RANKS ?=
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
CXX_USED := $(if $(filter default undefined,$(origin CXX)),g++,$(CXX))

.PHONY: train test test-slow lint format setup peers limits hugging-face report compiler headers clean

train: $(READY)
	$(BIN)/ulysses-triton train $(if $(RANKS),--ranks $(RANKS)) $(ARGS)

test: compiler headers lint
	$(BIN)/pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: compiler headers
	$(BIN)/pytest -m slow $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)

# The libraries that bench.peers measures against, in an environment of their own.
peers: $(VENV_PEERS)/.peers-ready
	$(VENV_PEERS)/bin/python -m bench.peers $(ARGS)

# Which head counts these take, and ours.
limits: $(VENV_PEERS)/.peers-ready
	$(VENV_PEERS)/bin/python -m bench.limits $(ARGS)

# Which models of transformers are right over shards, theirs and ours.
hugging-face: $(VENV_PEERS)/.peers-ready
	$(VENV_PEERS)/bin/python -m bench.hugging_face $(ARGS)

# bench/REPORT.md, its pictures and README's tables, from the records in bench/results.
report: $(READY)
	$(BIN)/python -m bench.report $(ARGS)

$(VENV_PEERS)/.peers-ready: requirements/dev.txt requirements/peers.txt pyproject.toml
	@$(MAKE) --no-print-directory VENV=$(VENV_PEERS) setup
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(VENV_PEERS)/bin/python -m pip install --disable-pip-version-check --quiet \
	  --no-deps --no-build-isolation --requirement requirements/peers.txt
	@touch $@

$(READY): requirements/dev.txt pyproject.toml
	@$(PYTHON) -c "" 2>/dev/null || { echo "make: no interpreter '$(PYTHON)': install Python 3.11, 3.12 or 3.13, or name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" \
	  || { echo "make: '$(PYTHON)' is not Python 3.11, 3.12 or 3.13: install one of them, or name it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c "import venv, ensurepip" 2>/dev/null \
	  || { echo "make: '$(PYTHON)' has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --requirement requirements/dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# torch.compile on CPU compiles C++ against Python's headers; the tests use it.
compiler:
	@command -v $(firstword $(CXX_USED)) >/dev/null \
	  || { echo "make: no C++ compiler '$(CXX_USED)', which torch.compile needs: install one (Debian, Ubuntu: apt-get install g++), or name it with CXX=..." >&2; exit 1; }

headers: $(READY)
	@$(BIN)/python -c "import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')))" \
	  || { echo "make: no Python.h, which torch.compile needs: install Python's headers (Debian, Ubuntu: apt-get install python3-dev)" >&2; exit 1; }

clean:
	rm -rf $(VENV) $(VENV_PEERS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
