# `make demo` and `make test` need nothing but a Python with venv: they make .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
# One thread per process: the suite and the training runs are processes side by side.
ENVIRONMENT := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# of `make bench`; with RESUME=1 it measures what the ledgers lack
MINUTES ?= 45
SOURCES := src tests tools conversion examples benchmarks setup.py
LINTED = $(wildcard $(SOURCES))

.PHONY: demo test slow lint format readme bench clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(if $(METHOD),--method $(METHOD))

test: lint
	$(ENVIRONMENT) $(BIN)/python -m pytest -q -n 2 -m "not slow"

slow: $(VENV)/.dev
	$(ENVIRONMENT) $(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)

readme: $(VENV)/.dev
	$(BIN)/python -m tools.readme
	$(BIN)/python examples/ablate.py --limit 0 --table docs/ablations.md

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/all.py --minutes $(MINUTES) $(if $(RESUME),--resume)

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp per extra: installed again only when what is to be installed has changed.
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: setup.py constraints.txt | $(BIN)/python
	$(INSTALL) ".[$*]"
	touch $@
