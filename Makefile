# Two commands on a fresh machine: `make demo`, `make test`. Each installs into .venv if needed.

PYTHON ?= python3
BIN := .venv/bin
CHECKED := data trainer launch tests benchmarks

.PHONY: demo test check install clean

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash benchmarks/demo.sh

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

check: install
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("nsphere needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf .venv runs shards exported
