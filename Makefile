# Three commands from a fresh clone: `make demo`, `make lab`, `make test`. Each sets up what it needs in .venv.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do command -v $$p >/dev/null 2>&1 && $$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: help demo lab test lint types unit slow notebooks browser bench kills soak mutation clean

help:
	@echo 'make demo   store a real directory tree in five processes, kill one, read everything back'
	@echo 'make lab    open JupyterLab on the first notebook'
	@echo 'make test   everything that must hold (within 10 minutes on 2 cores)'
	@echo 'make slow   more of the same: every planted bug is found again, real nodes are killed under load'
	@echo 'make kills  two hundred rounds of kill -9 on real clusters under load'
	@echo 'make bench  the launch benchmark against dask'
	@echo 'make soak   simulated runs with swarm faults on all processors; goes on where it stopped (SEEDS=1000 SECONDS=30)'
	@echo 'make mutation  mutants of the pure cores: writes docs/mutation.md (an hour of one core; goes on where it stopped)'

demo: $(VENV)/.core compiled
	$(BIN)/gostore demo

lab: $(VENV)/.notebook compiled
	$(BIN)/jupyter lab --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate notebooks/01_first_cluster.ipynb

test: lint types unit notebooks browser

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev compiled
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m 'not browser and not slow' tests

slow: $(VENV)/.dev compiled
	$(BIN)/pytest -n $(WORKERS) -m slow tests

notebooks: $(VENV)/.dev compiled
	$(BIN)/pytest --nbval --nbval-current-env --nbval-cell-timeout 120 notebooks labs

browser: $(VENV)/.dev compiled
	$(BIN)/pytest -m browser tests/browser

bench: $(VENV)/.dev compiled
	$(BIN)/gostore bench launch --vs dask

kills: $(VENV)/.core compiled
	$(BIN)/python tests/launch/kills.py --rounds 200

SEEDS ?= 1000
SECONDS ?= 30
FAULTS ?= swarm

soak: $(VENV)/.core compiled
	$(BIN)/gostore sim --seed 1 --seeds $(SEEDS) --seconds $(SECONDS) --faults $(FAULTS) --jobs 0 --tally .soak/tally.jsonl --shrink 0
	$(BIN)/python tests/power/soaked.py

mutation: $(VENV)/.mutation
	nice -n 10 $(BIN)/python tests/mutation/run.py --json

# Byte code for our own modules, also where PYTHONDONTWRITEBYTECODE is set: a node starts three times as fast with it.
.PHONY: compiled
compiled: | $(VENV)/bin/python
	@$(BIN)/python -m compileall -q gostore

$(VENV)/bin/python:
	@test -n '$(PYTHON)' || { echo 'GoStore needs Python 3.11 or later with the venv module; install it, or say: make PYTHON=/path/to/python3'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# One stamp for each set of extras; a later set includes the earlier ones.
$(VENV)/.core: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.notebook: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[notebook]'
	@touch $@ $(VENV)/.core

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.core $(VENV)/.notebook

$(VENV)/.mutation: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[mutation]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .mutation
