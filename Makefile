# Every target sets up what it needs by itself; see tools/setup.sh.
VENV   := .venv
BIN    := $(VENV)/bin
PYTHON := $(BIN)/python
READY  := $(VENV)/.ready

.PHONY: help setup check test demo bench sim soak broken reach clean

help:
	@echo "make setup   virtual environment and tools"
	@echo "make check   format, lint, types, layers, quick tests (under three minutes)"
	@echo "make test    everything, with real clients and virtual machines"
	@echo "make demo    two devices die under a running guest; nothing is lost"
	@echo "make bench   throughput, side by side with other NBD servers"
	@echo "make sim     crash simulation, SEEDS=n of them (default 200) and as large a share of all"
	@echo "             crashes and failpoints; one case: SEED=n, CRASH=name:n, FAILPOINT=name:n:power"
	@echo "make soak    the simulation until interrupted, or for MINUTES=n"
	@echo "make broken  engines broken on purpose: how soon the simulation catches each"
	@echo "make reach   lines of the engine that the simulation never comes by"
	@echo "make clean   remove what can be made again"

$(READY): pyproject.toml constraints.txt tools/setup.sh tools/link_libnbd.sh
	@tools/setup.sh

setup: $(READY)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTHON) -m pytest -q -n 2 -m "not slow and not guest" $(wildcard tests/unit tests/contract tests/fuzz tests/sim)

# First what needs nothing but processors, then fresh lives of the simulation, then real programs.
test: $(READY)
	$(PYTHON) -m pytest -n 2 $(addprefix tests/,unit contract property sim fuzz vectors static) $(PYTEST_ARGS)
	$(PYTHON) -m tests.sim --lives --seeds $(or $(SEEDS),240)
	$(PYTHON) -m pytest $(addprefix tests/,integration interop cli crash guest) $(PYTEST_ARGS)

demo: $(READY)
	$(PYTHON) -m bench.demo

bench: $(READY)
	$(PYTHON) -m bench $(BENCH_ARGS)

sim: $(READY)
	$(PYTHON) -m tests.sim --seeds $(or $(SEEDS),200)

soak: $(READY)
	$(PYTHON) -m tests.sim --forever

broken: $(READY)
	$(PYTHON) -m tests.sim.broken

reach: $(READY)
	$(PYTHON) -m tests.sim.reach $(or $(SEEDS),150)

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
