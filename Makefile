BIN := .venv/bin
# Without PYTHON= it is the Python of .venv: `python3 -m venv` would leave the link to that one where it is, and
# name the folder of another one's modules beside it.
PYTHON ?= $(or $(realpath $(BIN)/python),python3)
INSTALLED := .venv/.installed
DEVELOPED := .venv/.developed
COMPILED := .venv/.compiled
APPLICATIONS := .venv-applications
OPENAPI := .venv-openapi
SMUGGLING := .venv-smuggling
SOURCES := *.py services postgres server wire migrations
# The commands in .venv name the folder that they were made in, and a .venv that is made again keeps its
# old Python. So it is made anew if the folder was moved, if its Python is gone or has become another version,
# or if PYTHON= names another one. A .venv that is a link may be another project's, and is left alone: --clear
# would empty what the link leads to.
WHICH := -c 'import sys; print(sys.base_prefix, *sys.version_info[:2])'
OTHER := $(if $(filter file,$(origin PYTHON)),false,[ "$$($(PYTHON) $(WHICH))" != "$$($(BIN)/python $(WHICH))" ])
PACKAGES := -c 'import os, sysconfig; os.stat(sysconfig.get_path("purelib"))'
STALE := $(shell [ -L .venv ] || [ ! -d .venv ] || { \
	[ -x $(BIN)/python ] && $(BIN)/python $(PACKAGES) >/dev/null 2>&1 \
	&& { [ ! -e $(BIN)/pw_migrate ] || head -n 2 $(BIN)/pw_migrate | grep -qF '$(CURDIR)/$(BIN)/'; } \
	&& ! $(OTHER); } || echo --clear)

# Four tests side by side: most wait for something that is not the processor. Some measure time, which
# a neighbour can disturb: one that fails is tried again with the machine to itself, and has to pass
# there.
define tests
$(BIN)/python -m pytest -n 4 --dist worksteal $(1) \
	|| $(BIN)/python -m pytest --last-failed --last-failed-no-failures none $(1)
endef

# One target fills .venv while another one reads it.
.NOTPARALLEL:
.PHONY: stale run test bench bench-full faults faults-cluster soak fuzz smuggling install compiled check audit applications
.PHONY: applications-light openapi

# Compiling takes half a minute. `make run` does it once; after a change all runs from source.
run: $(DEVELOPED) $(COMPILED)
	@exec $(BIN)/python app.py --dev

# All tests but those that are marked slow; `make check` runs those too.
test: $(DEVELOPED) compiled
	$(call tests,-m "not slow")

# Eight minutes, and twenty-five; bench/run.py --help says more. Node, nginx, Caddy and Debian's
# PostgreSQL, which has pg_trgm, take part where they are installed. AGAINST is a commit.
bench: $(DEVELOPED) compiled
	$(BIN)/python bench/run.py --quick

bench-full: $(DEVELOPED) compiled
	$(BIN)/python bench/run.py --full $(if $(AGAINST),--against $(AGAINST))

faults: $(DEVELOPED) compiled
	GENERATIONS=50 $(BIN)/python -m pytest tests/operating/test_restarts.py
	$(BIN)/python bench/faults.py
	$(BIN)/python bench/storm.py

# Four hours of everything at once; `make soak MINUTES=10` for less.
MINUTES ?= 240
soak: $(DEVELOPED) compiled
	$(BIN)/python bench/soak.py --minutes $(MINUTES)

# Needs Debian's packages patroni, etcd-server, postgresql, haproxy and pgbouncer.
faults-cluster: $(DEVELOPED) compiled
	$(BIN)/python bench/cluster.py --failovers 20
	$(BIN)/python bench/cluster.py --failovers 6 --through haproxy
	$(BIN)/python bench/cluster.py --failovers 6 --through pgbouncer
	$(BIN)/python bench/cluster.py --failovers 6 --asynchronous

# A quarter of an hour, on a machine that does nothing else.
fuzz: $(DEVELOPED) compiled
	FUZZ_CASES=200000 $(BIN)/python -m pytest tests/proxy/test_fuzz.py

# Other servers behind Gatehouse and in front of it. Needs Debian's packages nginx, caddy, haproxy, nodejs
# and golang-go; some minutes.
smuggling: $(DEVELOPED) compiled $(SMUGGLING)/.installed
	SMUGGLING_CASES=5000 $(BIN)/python -m pytest tests/smuggling tests/proxy/test_smuggling.py

$(SMUGGLING)/.installed: tests/smuggling/requirements.txt
	$(PYTHON) -m venv $(SMUGGLING)
	$(SMUGGLING)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

stale:

# What production needs, and nothing else; the other targets add what they need themselves.
install: $(INSTALLED)
	@$(BIN)/python compile/build.py again

$(INSTALLED): requirements.txt $(STALE:--clear=stale)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(STALE) .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@# The user that it runs as may not write here, and would make bytecode of all of it at each start.
	$(BIN)/python -m compileall -q $(SOURCES)
	@touch $@

# What is tested and measured runs as it does in production.
compiled: $(INSTALLED)
	@$(BIN)/python compile/build.py

$(COMPILED): $(INSTALLED)
	@$(BIN)/python compile/build.py
	@touch $@

$(DEVELOPED): $(INSTALLED) requirements-dev.txt compile/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

check: $(DEVELOPED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES) compile bench/*.py
	$(BIN)/proselint check --config .proselintrc.json README.md CHANGELOG.md docs
	$(MAKE) test
	$(call tests,-m slow)

audit: $(DEVELOPED)
	$(BIN)/pip-audit --strict --requirement requirements.txt --requirement compile/requirements.txt

# Real applications behind Gatehouse. Those of test_light.py are part of what a merge has to pass.
applications: $(DEVELOPED) compiled $(APPLICATIONS)/.all
	$(BIN)/python -m pytest tests/applications

applications-light: $(DEVELOPED) compiled $(APPLICATIONS)/.light
	$(BIN)/python -m pytest tests/applications/test_light.py

$(APPLICATIONS)/.light: tests/applications/requirements-light.txt
$(APPLICATIONS)/.all: tests/applications/requirements.txt tests/applications/requirements-light.txt
$(APPLICATIONS)/.light $(APPLICATIONS)/.all:
	$(PYTHON) -m venv $(APPLICATIONS)
	$(APPLICATIONS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# Linters of docs/openapi.yaml, and clients that are made of it; npm is needed.
openapi: $(DEVELOPED) compiled $(OPENAPI)/.installed
	$(BIN)/python -m pytest tests/openapi

$(OPENAPI)/.installed: tests/openapi/requirements.txt tests/openapi/package.json
	$(PYTHON) -m venv $(OPENAPI)
	$(OPENAPI)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/openapi/requirements.txt
	cp tests/openapi/package.json $(OPENAPI)
	npm install --prefix $(OPENAPI) --silent --no-audit --no-fund --no-package-lock
	@touch $@
