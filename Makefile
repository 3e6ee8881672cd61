# PYTHON is the Python 3.11 or newer to make .venv with.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: run test bench install check audit faults fuzz

run: install
	@$(BIN)/python app.py --dev

install: $(INSTALLED)

$(INSTALLED): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	@touch $@

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: install
	$(BIN)/python bench/run.py

faults: install
	$(BIN)/python bench/faults.py

fuzz: install
	$(BIN)/python -m pytest tests/test_fuzz.py

audit: install
	$(BIN)/pip-audit -r requirements.txt
