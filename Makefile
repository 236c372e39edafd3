# `make demo` and `make test` work from a fresh clone: they make .venv and install into it what they need.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:

# constraints.txt is tried out on 3.11; any Python from 3.10 on may do: make test PYTHON=python3.13
PYTHON ?= $(shell for p in python3.11 python3 python3.13 python3.12 python3.10; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then echo $$p; break; fi; done)
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# Two processes; tests/conftest.py says which tests stay together. PYTEST_ARGS='-n 0' runs all in one. One that dies ends
# the run: pytest-xdist 3.8 starts another, and may then wait forever (its issue 1378).
IN_PARALLEL := -n 2 --no-loadscope-reorder --max-worker-restart=0
NATIVE := $(wildcard engines/cpp/*.* engines/cpp/*/* engines/mdnet_engines/cuda/*)
C_FILES := $(filter %.c %.cpp %.h %.cu,$(NATIVE) $(wildcard tests/support/*/*))

.PHONY: help demo test test-slow test-all lint typecheck format ptx gpu-bundles gpu-kit gpu-check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.installed-demo ## build a small demo bundle in ./mdnet-bundle and score examples/ with it
	$(BIN)/mdnet-export build
	$(BIN)/mdnet-rt score examples/ --format table

test: lint typecheck ## lint, types and all tests but the slow ones: some minutes; without a GPU some are skipped
	$(BIN)/pytest -m 'not slow' $(IN_PARALLEL) $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-test ## the slow tests alone: full size, fresh installs, sanitizers, benchmarks
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

test-all: test test-slow ## what CI runs

lint: $(VENV)/.installed-test ## style, format and which room imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

typecheck: $(VENV)/.installed-test ## mypy on the packages
	$(BIN)/mypy

format: $(VENV)/.installed-test ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

ptx: $(VENV)/.installed-test ## compile selective_scan.cu into the PTX that is committed beside it
	$(BIN)/python -m mdnet_engines.cuda.kernel

# Of gpu-check's: what gpu-bundles writes, and gpu-kit packs. KIT_PYTHON is the other machine's Python.
BUNDLES ?= build/gpu-bundles
KIT ?= build/gpu-kit
KIT_PYTHON ?= 3.12
GPU_CHECK = $(or $(wildcard $(BIN)/python),python3) benchmarks/gpu_check.py

gpu-bundles: ## before gpu-check: build the bundles that it runs; needs no GPU
	$(GPU_CHECK) bundles $(BUNDLES)

gpu-kit: gpu-bundles ## before gpu-check on a machine without a package index: bundles and wheels in pieces of 58 MiB
	$(GPU_CHECK) kit $(KIT) --bundles $(BUNDLES) --python $(KIT_PYTHON)

# Installs nothing: a GPU machine may have no package index.
gpu-check: ## prove on a GPU what takes one, in nine minutes (docs/gpu.md)
	$(GPU_CHECK) --bundles $(BUNDLES)

clean: ## remove .venv, build output, caches and the demo bundle
	rm -rf $(VENV) build dist mdnet-bundle *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# A stamp is newer than what it was installed from, so that a second run installs nothing.
$(VENV)/.installed-demo: EXTRAS := cpu,export
$(VENV)/.installed-test: EXTRAS := cpu,cuda-dev,export,fuzz,lint,openvino,rtx,test
$(VENV)/.installed-demo $(VENV)/.installed-test: pyproject.toml constraints.txt $(NATIVE)
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(or $(PYTHON),python3) is not Python 3.10 or newer; name one: make PYTHON=python3.11" >&2; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "installing [$(EXTRAS)] into $(VENV): a few minutes, mostly for torch"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	touch $(VENV)/.installed-demo $@
