PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SOURCES := *.py services postgres server wire migrations

.PHONY: run test bench faults fuzz install check audit

run: install
	@exec $(BIN)/python app.py --dev

test: install
	$(BIN)/python -m pytest

bench: install
	$(BIN)/python bench/run.py

faults: install
	$(BIN)/python bench/faults.py

fuzz: install
	FUZZ_CASES=20000 $(BIN)/python -m pytest tests/proxy/test_fuzz.py

install: $(INSTALLED)

$(INSTALLED): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES) bench/*.py
	$(MAKE) test

audit: install
	$(BIN)/pip-audit --strict --requirement requirements.txt
