# What a newcomer and the CI type. `make help` lists it; install steps run again only when the pins change.

PYTHON ?= python3
VENV ?= .venv
# Passed to every `pip install`, such as --find-links with a smaller CPU build of torch.
PIP_FLAGS ?=
# Passed to `ctd quickstart` and to pytest.
ARGS ?=

BIN := $(VENV)/bin
PINS := pyproject.toml constraints.txt constraints-content.txt
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)

.PHONY: help quickstart test lint format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

quickstart: $(RUNTIME)  ## install into .venv, train the whole chain on MovieLens-100k, show what it recommends
	@echo "==> ctd quickstart $(ARGS)"
	@$(BIN)/ctd quickstart $(ARGS)

test: lint  ## install into .venv, then style, types, layers and every test
	@echo "==> pytest $(ARGS)"
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(DEV)  ## style, types and layers
	@echo "==> ruff check"
	@$(BIN)/ruff check --quiet .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check --quiet .
	@echo "==> mypy"
	@$(BIN)/mypy
	@echo "==> lint-imports"
	@$(BIN)/lint-imports

format: $(DEV)  ## rewrite the code in the style that lint wants
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

clean:  ## remove .venv and every cache; runs/ stays
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info < (3, 14) or \
		sys.exit("error: Python 3.10 to 3.13 is needed, " + sys.executable + " is " + sys.version.split()[0] + \
		"; choose one with: make PYTHON=python3.11 ...")'
	@echo "==> new environment $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV)

$(RUNTIME): $(PINS) | $(BIN)/python
	@echo "==> installing ctd-scale into $(VENV) (some minutes)"
	@$(INSTALL) -c constraints.txt -e .
	@$(INSTALL) --no-deps -r constraints-content.txt
	@touch $@

$(DEV): $(PINS) | $(BIN)/python
	@echo "==> installing ctd-scale with its development tools into $(VENV) (some minutes)"
	@$(INSTALL) -c constraints.txt -e '.[dev]'
	@$(INSTALL) --no-deps -r constraints-content.txt
	@touch $(RUNTIME) $@
