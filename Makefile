# `make` lists the targets. Another interpreter: `make setup PYTHON=python3.12`.
PYTHON ?= python3
METHOD ?= rapm
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup lint test demo clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-14s%s\n", $$1, $$2 }'

setup: $(STAMP)  ## create .venv and install rapm into it, with the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@[ -x $(BIN)/pip ] || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "setup: rapm needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "       Name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@[ -x $(BIN)/pip ] || { echo "setup: creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "setup: installing rapm and its dependencies into .venv (the first time takes minutes)"
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

lint: setup  ## ruff check, ruff format --check, pyright
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo "lint: to put this right: $(BIN)/ruff format" >&2; exit 1; }
	@$(BIN)/pyright

test: lint  ## lint, then the tests, in two processes side by side
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

demo: setup  ## distil the toy teacher into runs/demo-METHOD, score it (CPU); METHOD=midpoint
	@$(BIN)/rapm distill --teacher toy --method $(METHOD) --out runs/demo-$(METHOD)
	@$(BIN)/rapm evaluate runs/demo-$(METHOD)
	@echo "To call rapm yourself: source $(BIN)/activate, or $(BIN)/rapm. Next: README.md, Use a LoRA."

clean:  ## remove caches and build leftovers; keeps .venv and runs/
	@rm -rf build .pytest_cache .ruff_cache
	@find src tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +
