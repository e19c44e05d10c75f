# Two commands, each sets up what it needs: `make demo` and `make test`. The first run installs SGLang (about 11 GB).

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# `make test-gpu` runs in an environment that has SGLang already, with nothing added but this package.
GPU_PYTHON ?= python3
GPU_ARGS ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
# What must be covered by unit tests alone: the parts without I/O, where every line can be reached.
COVERED := ledger policy protocol
COVERAGE_PERCENT := 95

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo lint unit checks e2e check-patches smoke test test-cells test-all test-gpu clean distclean

help:
	@echo "make demo      both load paths on this machine, compared with stock SGLang token by token"
	@echo "make test      lint, types, layers, unit tests, end-to-end tests, patches/"
	@echo "make test-cells  outputs over each combination of README's table that make test leaves out"
	@echo "make test-all  the same, end-to-end tests over the full cross of settings"
	@echo "make test-gpu  lists and runs what only a CUDA machine can show, with \$$(GPU_PYTHON), which has SGLang and this package"
	@echo "make smoke     the benchmark on a few short contexts: does it run, are its bytes right?"
	@echo "make check-patches   patches/ on a copy of the installed SGLang, and tests against it"
	@echo "make lint      lint, types and layers alone"
	@echo "make unit      unit tests and their coverage alone"
	@echo "make clean     remove outputs and caches; make distclean: $(VENV) too"

setup: $(STAMP)

$(STAMP): pyproject.toml platforms/cpu/pyproject.toml scripts/setup.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/setup.sh
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m benchmarks.demo $(DEMO_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/mypy --config-file platforms/cpu/pyproject.toml platforms/cpu/sglang_cpu_platform
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }
	@grep "^Contracts:" $(VENV)/lint-imports.log

unit: $(STAMP)
	@mkdir -p out
	$(BIN)/python -m pytest -q -m "not e2e and not gpu" --cov --cov-report= --junitxml=out/unit.xml $(PYTEST_ARGS)
	@for part in $(COVERED); do \
	    $(BIN)/coverage report --include="sglang_dualpath/$$part.py,sglang_dualpath/$$part/*" \
	        --fail-under=$(COVERAGE_PERCENT) > out/coverage-$$part.txt \
	    || { cat out/coverage-$$part.txt; echo "$$part: less than $(COVERAGE_PERCENT) % covered"; exit 1; }; \
	    echo "coverage of $$part: $$(sed -n 's/^TOTAL.* //p' out/coverage-$$part.txt)"; \
	done

# One after the other: some unit tests are about time, and mistake a busy machine for a fault.
checks: lint unit

e2e: $(STAMP)
	@mkdir -p out
	$(BIN)/python -m pytest -m "e2e and not gpu" --durations=40 --junitxml=out/e2e.xml $(PYTEST_ARGS)

check-patches: $(STAMP)
	$(BIN)/python scripts/check_patches.py

test: checks e2e check-patches

# No claim of speed: that the benchmark runs, and that its bytes and tokens are right.
smoke: $(STAMP)
	$(BIN)/python -m benchmarks.compare --preset smoke --out out/smoke

# Each combination of README's table that CI leaves out: outputs against stock's, bytes read once; some 50 minutes.
CELL_TESTS := nothing_is_cached or all_comes_from_storage or swapped_page or read_bytes_are_hit_bytes
test-cells: export DUALPATH_TEST_CELLS := 1
test-cells: $(STAMP)
	@mkdir -p out
	$(BIN)/python -m pytest -m "e2e and not gpu" tests/e2e/test_identity.py -k "$(CELL_TESTS)" --junitxml=out/cells.xml \
	    $(PYTEST_ARGS)

test-all: export DUALPATH_TEST_ALL := 1
test-all: checks e2e check-patches

# Not in $(VENV): on a GPU machine SGLang is there.
test-gpu:
	@$(GPU_PYTHON) -m tests.gpu $(GPU_ARGS)

clean:
	rm -rf out build dist .coverage .coverage.* htmlcov .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -name .git -prune -o -name $(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) *.egg-info platforms/cpu/*.egg-info
