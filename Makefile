# make demo and make test are all that one needs; each sets up first. make help lists the rest.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
PACKAGES := $(patsubst %/__init__.py,%,$(wildcard $(addsuffix /__init__.py,rings pvdrivers blkback netback scsiback usbback)))
PYTEST := $(BIN)/python -m pytest
# Property tests see the same input at each run; 'make fuzz' is for new input.
SAME := --hypothesis-profile=ci
# What also runs with the JIT off and with bounds checks: everything that decides over bytes from a stranger.
PURE_TESTS = tests/rings $(wildcard tests/*/test_request*.py) \
	$(addprefix tests/netback/test_,frame.py table.py vlan.py capture_ring.py cut.py mtu.py waiting.py link.py)
SECONDS ?= 60
ARGS ?=
BED ?=

# Interpreter to build the environment with; empty: python3.11, or the first that is 3.11 or later.
PYTHON ?=
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test checks test-full test-slow test-nojit test-boundscheck lint lint-tools \
	test-xen test-xen-quick bench-xen fuzz bench warm clean distclean
# The targets share one machine, and their output is read from top to bottom. Only `checks` has none that is timed.
ifneq ($(MAKECMDGOALS),checks)
.NOTPARALLEL:
endif

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP) ## make .venv from PyPI wheels, when it is missing or out of date
	@:

$(STAMP): pyproject.toml requirements/constraints.txt .ci/setup
	@.ci/setup $(VENV) $@

demo: setup ## run the main job: a guest's disk and two guests' network, every byte verified (ARGS=...)
	@$(BIN)/pvdrivers demo $(ARGS)

test: setup ## check the code and run the tests
	@$(MAKE) --no-print-directory -j2 -Otarget checks
	@echo "test: the suite without what is marked slow"
	@$(PYTEST) $(SAME) -m "not slow" $(ARGS)

test-slow: setup ## run only the tests that 'make test' leaves out
	@echo "test: what is marked slow"
	@$(PYTEST) $(SAME) -m slow $(ARGS)

test-full: setup ## run everything
	@$(MAKE) --no-print-directory -j2 -Otarget checks
	@echo "test: the whole suite"
	@$(PYTEST) $(SAME) $(ARGS)

test-xen-quick: setup ## the core of test-xen, in one machine of two processors: 4 to 7 minutes, when its images are there
	@$(BIN)/python -m tests.xen.bed run $(BED) --seconds 900 -- -v tests/xen -m xen_quick $(ARGS)

test-xen: setup ## the real Xen, in two emulated machines: dom0, guests, our backend (as root, on Debian 12; BED=--again)
	@$(BIN)/python -m tests.xen.bed run --machines 2 --seconds 4500 $(BED) -- -v tests/xen tests/platform -k xen $(ARGS)

bench-xen: setup ## there: hypercalls and system calls a request, counted, beside xen-blkback and qdisk (ARGS=--quick)
	@$(BIN)/python -m tests.xen.bed sh --seconds 5400 -- "cd /opt/pvdrivers; python3 -m tests.xen.bench $(ARGS)"

# What takes processors and is not timed: two at a time. Compiling is of it, so that no test waits for a compiler.
checks: warm test-boundscheck test-nojit lint-tools

test-nojit: setup
	@echo "test: rings and requests with the JIT off"
	@NUMBA_DISABLE_JIT=1 $(PYTEST) -q $(SAME) -m "not slow" $(PURE_TESTS)

test-boundscheck: setup
	@echo "test: rings and requests with bounds checks"
	@NUMBA_BOUNDSCHECK=1 $(PYTEST) -q $(SAME) -m "not slow" $(PURE_TESTS)

lint: setup lint-tools ## ruff, mypy --strict, and who may import whom
	@$(PYTEST) -q tests/test_layering.py

lint-tools: setup
	@echo "lint: ruff"
	@$(BIN)/ruff check -q --output-format concise .
	@echo "lint: mypy --strict $(PACKAGES)"
	@$(BIN)/mypy --strict --no-error-summary $(PACKAGES)

fuzz: setup ## property tests with new random input for SECONDS (60)
	@echo "fuzz: for $(SECONDS) s"
	@end=$$(($$(date +%s) + $(SECONDS))); round=0; \
	while [ "$$(date +%s)" -lt "$$end" ]; do \
		round=$$((round + 1)); echo "fuzz: round $$round"; \
		PVDRIVERS_FUZZ_UNTIL=$$end $(PYTEST) -q -rN -x -p no:cacheprovider -m "hypothesis or fuzz" \
			--hypothesis-profile=fuzz $(ARGS) || exit 1; \
	done; echo "fuzz: nothing found in $$round round(s)"

bench: setup ## measure beside the peers, then the kernels alone (ARGS=--quick)
	@for what in ring blk net xenstore fairness; do \
		echo "bench: $$what"; $(BIN)/pvdrivers bench $$what $(ARGS) || exit 1; done
	@$(PYTEST) -q -rN --benchmark-enable --benchmark-only

warm: setup ## compile all kernels now
	@$(BIN)/pvdrivers warm

clean: ## remove what tests and tools leave behind
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove the virtual environment as well
	rm -rf $(VENV)
