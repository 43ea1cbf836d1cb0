# The newcomer's two doors. Each does everything on a machine with only Python 3.11+ and make:
#
#     make demo    capture a small language model, ask SQL questions, train a sparse autoencoder
#     make test    ruff, mypy and pytest, on all cores
#
# Both install into .venv once, and again when pyproject.toml or constraints.txt change. Settings:
#
#     PYTHON=/path/to/python3.12      the interpreter that makes .venv
#     PIP_ARGS="..."                  more arguments for pip install, such as the index of PyTorch's CPU builds,
#                                     which saves a download of some GB where there is no NVIDIA GPU
#     DEMO_ARGS="--out my.strap"      arguments for strapfmt demo
#     PYTEST_ARGS="-k layering"       arguments for pytest

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.strapfmt-installed
PYTHON ?=
PIP_ARGS ?=
DEMO_ARGS ?= --overwrite
PYTEST_ARGS ?=
IS_USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help demo test js

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(STAMP)
	@$(BIN)/strapfmt demo $(DEMO_ARGS)

test: $(STAMP) js
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist loadfile $(PYTEST_ARGS)

$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -c '$(IS_USABLE)' 2>/dev/null || { \
	  for python in $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3.13 python3.14 python3 python); do \
	    if "$$python" -c '$(IS_USABLE)' 2>/dev/null; then found="$$python"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "strapfmt needs Python 3.11 or newer with its venv module, and found none$(if $(PYTHON), at $(PYTHON))." >&2; \
	    echo "Install it (Debian and Ubuntu: apt install python3.11-venv; macOS: brew install python@3.11)," >&2; \
	    echo "or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$found"; \
	  "$$found" -m venv --clear $(VENV); \
	}
	@echo "Installing strapfmt, PyTorch and the rest into $(VENV): some minutes, once"
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[dev]'
	@touch $@

# Another language's Arrow reader opens our files in one test; without npm that test says why it is skipped.
js:
	@if [ -f tests/js/package.json ] && command -v npm >/dev/null 2>&1; then \
	  if [ ! -d tests/js/node_modules ] || [ tests/js/package.json -nt tests/js/node_modules ]; then \
	    echo "Installing the JavaScript Arrow reader into tests/js"; \
	    npm --prefix tests/js install --no-audit --no-fund --loglevel=error && touch tests/js/node_modules \
	      || echo "npm could not install it; that test will be skipped" >&2; \
	  fi; \
	fi
