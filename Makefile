# `make help` lists what there is. Everything needs only Python, pip and make.
.DEFAULT_GOAL := help
.PHONY: help install serve test lint wheel clean

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11 python3.14,$(shell command -v $(name) 2>/dev/null)))
EXTRA ?= auto
PROFILE ?= demo
JOBS ?= 2
VENV_PYTHON := .venv/bin/python

# A Python that was named is the one to use; else the first that fits.
BOOTSTRAP = $(or $(PYTHON),$(error no python3 found: install Python 3.11 or newer)) -m bootstrap \
	--extra '$(EXTRA)' $(if $(filter command environment,$(origin PYTHON)),--python '$(PYTHON)')

LINT = $(VENV_PYTHON) -m ruff check . && $(VENV_PYTHON) -m ruff format --check . && $(VENV_PYTHON) -m mypy

help: ## This list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile
	@echo '  EXTRA=cpu|gpu PROFILE=name PORT=8000 JOBS=2 ARGS="…" PYTHON=… change what these do'

install: ## Install into .venv; does nothing when nothing changed
	@$(BOOTSTRAP)

serve: install ## Install, then serve PROFILE (demo) on PORT (the profile's)
	@exec .venv/bin/serve --profile '$(PROFILE)' $(if $(PORT),--port '$(PORT)') $(ARGS)

test: ## Install, then lint and run every test (ARGS go to pytest)
	@$(BOOTSTRAP) --test
	@$(LINT)
	@$(VENV_PYTHON) -m pytest -n $(JOBS) $(ARGS)

lint: ## Install, then lint and check the types only
	@$(BOOTSTRAP) --test
	@$(LINT)

wheel: ## Install, then build the wheel into dist/
	@$(BOOTSTRAP) --test
	@$(VENV_PYTHON) -m build --wheel --no-isolation

clean: ## Remove .venv and everything that was built
	rm -rf .venv .venv.lock dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
