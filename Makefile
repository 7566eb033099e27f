# Two commands to know: `make demo` trains a small study and writes its report, `make test` runs every check.
# Both build .venv the first time and are quick to start after that.
#
#   TORCH=torch==2.11.0   which torch is installed
#   TORCH_INDEX=URL       a package index to take torch from, such as the one with its CPU-only builds
#   PYTHON=python3.12     which Python builds .venv (3.11 or later; found by itself when not given)
#   VENV=DIR              where the virtual environment lives

TORCH ?= torch==2.13.0
TORCH_INDEX ?=
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help demo test lint format clean FORCE

# A process started here would otherwise find kernels/ and yaml/ as packages of those names.
export PYTHONSAFEPATH := 1

help:
	@echo 'make demo     install, train the quickstart study, write its report'
	@echo 'make test     install what tests need; ruff, mypy, pytest'
	@echo 'make lint     ruff and mypy alone'
	@echo 'make format   let ruff rewrite the sources in house style'
	@echo 'make clean    remove .venv, caches and build products (runs/ stays)'

demo: $(VENV)/installed-demo
	@echo; echo '==> training the quickstart study'
	@$(BIN)/hybridzoo study run quickstart --out runs/quickstart

test: lint
	@echo '==> pytest'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(VENV)/installed-test
	@echo '==> ruff'
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo '==> mypy'
	@$(BIN)/mypy

format: $(VENV)/installed-test
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, in a call of its own; `constraints.txt` then keeps every later install from replacing it.
$(VENV)/constraints.txt: $(VENV)/torch.wanted
	@echo '==> installing $(TORCH): the largest download'
	@$(PIP) install --prefer-binary $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@

# Rewritten, and so newer than everything built on it, only when TORCH or TORCH_INDEX has changed.
$(VENV)/torch.wanted: $(VENV)/pyvenv.cfg FORCE
	@wanted='$(TORCH) $(TORCH_INDEX)'; \
	if [ "$$(cat $@ 2>/dev/null)" != "$$wanted" ]; then echo "$$wanted" > $@; fi

$(VENV)/pyvenv.cfg:
	@candidates='$(or $(PYTHON),python3 python3.13 python3.12 python3.11 python)'; \
	for python in $$candidates; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "==> building $(VENV) with $$("$$python" --version)"; \
	        "$$python" -m venv --clear --prompt hybridzoo $(VENV) && exit 0; \
	        rm -rf $(VENV); \
	        echo "error: '$$python -m venv' failed; on Debian and Ubuntu it needs the package python3-venv" >&2; exit 1; \
	    fi; \
	done; \
	echo "error: no Python 3.11 or later among: $$candidates. Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; \
	exit 1

$(VENV)/installed-demo: $(VENV)/constraints.txt pyproject.toml
	@echo '==> installing hybridzoo and what a study needs'
	@$(PIP) install --constraint $(VENV)/constraints.txt --editable '.[study]'
	@touch $@

$(VENV)/installed-test: $(VENV)/constraints.txt pyproject.toml
	@echo '==> installing hybridzoo and what its tests need'
	@$(PIP) install --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $@
