# Everything runs in .venv, which `setup` makes once and later calls find ready.
# Variables: PYTHON (3.11 to 3.13), EXTRA (cpu or gpu), ARGS (given to run.py, to pytest and to the benchmarks).

# The first that really starts: version managers leave names on the path that do not.
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c pass >/dev/null 2>&1 && { echo $$p; break; }; done)
endif
VENV_PYTHON := .venv/bin/python

.PHONY: help setup run test fuzz lint bench clean

help:
	@echo 'make run     set up, then run the loop; ARGS="..." goes to run.py'
	@echo 'make test    set up, then run the tests; ARGS="..." goes to pytest'
	@echo 'make fuzz    set up, then the property tests alone, on other examples each time'
	@echo 'make lint    set up, then ruff and mypy'
	@echo 'make bench   set up, then all benchmarks into docs/benchmarks.md; ARGS=--quick takes less time'
	@echo 'make setup   make .venv; EXTRA=gpu for NVIDIA GPUs, PYTHON=/path/to/python3.12 for another Python'
	@echo 'make clean   remove .venv and caches; runs/ stays'

setup:
	@[ -n "$(PYTHON)" ] || { echo 'set-up: no Python found; retract needs Python 3.11, 3.12 or 3.13' >&2; exit 1; }
	@"$(PYTHON)" pipeline/install.py $(if $(EXTRA),--extra $(EXTRA))

run: setup
	@$(VENV_PYTHON) run.py $(ARGS)

test: setup
	@$(VENV_PYTHON) -m pytest $(ARGS)

fuzz: setup
	@$(VENV_PYTHON) -m pytest -m hypothesis --hypothesis-profile=default $(ARGS)

lint: setup
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m mypy

bench: setup
	@$(VENV_PYTHON) benchmarks/run_all.py $(ARGS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
	find . -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
