# `make train` and `make test` are all a new machine needs; `make help` lists the rest.
# Each set-up step leaves a stamp, so a second call starts at once.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
MINUTES ?= 5
RANKS ?= 2
ARGS ?=
FAST ?= 0

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMPS := $(VENV)/.stamps
comma := ,
CXX_FILES = $(shell find csrc tests/csrc -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')
SHELL_FILES = $(shell find launch -name '*.sh' -o -name '*.sbatch')
NATIVE := $(shell find csrc -type f 2>/dev/null)

SYSTEM_PATH := $(PATH)
# ninja must be found when torch compiles an operator, and operators stay inside the project.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions
export OMP_NUM_THREADS ?= 1
# What is needed is installed above or lies in this repository: no job may fetch anything.
export HF_HUB_OFFLINE ?= 1

# $(call step,what it does,command): one line for the user, with the time; all output on failure.
define step
@mkdir -p .cache/make; log=.cache/make/$(notdir $@).log; begin=$$SECONDS; \
printf '  %-56s' '$(1)'; \
if { $(2); } >"$$log" 2>&1 </dev/null; then printf '%5d s\n' $$((SECONDS - begin)); \
else status=$$?; printf 'failed\n'; cat "$$log"; exit $$status; fi
endef

.PHONY: help install train test lint format bench gpu clean distclean

help: ## Show this list
	@printf 'Lowtide. Targets:\n'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@printf 'Options: PYTHON=python3.11  MINUTES=60  RANKS=2  FAST=1  ARGS="..."\n'

install: $(STAMPS)/lowtide .cache/make/operators ## Create .venv with the pinned versions and build everything

train: install ## Train the example on real text for MINUTES (5), with a report at the end
	@$(PY) -m torch.distributed.run --standalone --nproc-per-node $(RANKS) \
	    examples/pretrain/train.py --config examples/pretrain/ds.json --minutes $(MINUTES) $(ARGS)

test: install ## Run the tests that need no GPU (FAST=1: without the slow ones)
	@$(PY) -m pytest -m "not gpu$(if $(filter 1,$(FAST)), and not slow)" $(ARGS)

lint: $(STAMPS)/lowtide ## Check style, types, spelling, C++ and shell
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/codespell $(wildcard plugins csrc tests examples benchmarks docs launch *.md *.py *.toml)
	@$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	@$(VENV)/bin/shellcheck -x .ci/run $(SHELL_FILES)

format: $(STAMPS)/lowtide ## Apply the style
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/clang-format -i $(CXX_FILES)

bench: install ## Run every benchmarks/bench_*.py, write a report to benchmarks/results/
	@$(PY) benchmarks/report.py $(ARGS)

gpu: install ## Run GPU tests and benchmarks, write a report to benchmarks/results/
	@$(PY) benchmarks/report.py --gpu $(ARGS)

clean: ## Remove what was built and cached; .venv and runs/ stay
	@rm -rf build dist .cache .hypothesis $(STAMPS)/lowtide plugins/*.egg-info
	@rm -f plugins/lowtide/_native*.so plugins/lowtide/_build_info.json
	@find plugins tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## As clean, and remove .venv
	@rm -rf $(VENV)

WANTED := Lowtide needs Python 3.10 or newer; to name one: make PYTHON=/path/to/python3

# --- set-up, in the only order that works: torch, build tools, DeepSpeed (imports torch), the rest

$(STAMPS)/venv: export PATH := $(SYSTEM_PATH)
$(STAMPS)/venv:
	@command -v $(PYTHON) >/dev/null || { echo 'No $(PYTHON) found. $(WANTED)'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "$(PYTHON) is $$($(PYTHON) --version 2>&1). $(WANTED)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	    echo '$(PYTHON) cannot create environments. Debian, Ubuntu: apt-get install python3-venv'; exit 1; }
	@echo 'Setting up Lowtide in $(VENV), once. It takes some minutes.'
	$(call step,Python environment,$(PYTHON) -m venv $(VENV))
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: constraints.txt | $(STAMPS)/venv
	$(call step,PyTorch,$(PIP) torch numpy)
	@touch $@

$(STAMPS)/tools: $(STAMPS)/torch
	$(call step,Build tools,$(PIP) setuptools wheel pybind11 ninja packaging psutil py-cpuinfo)
	@touch $@

$(STAMPS)/deepspeed: $(STAMPS)/tools
	$(call step,DeepSpeed,DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed)
	@touch $@

$(STAMPS)/lowtide: $(STAMPS)/deepspeed pyproject.toml setup.py $(NATIVE)
	$(call step,Lowtide with its native code and all other packages,$(PIP) --no-build-isolation -e '.[hf$(comma)megatron$(comma)dev]')
	@$(PY) -c 'from lowtide.core.native import status; s = status(); print("  Native code:", s.reason or "ready, " + " ".join(s.features))'
	@touch $@

# Its own messages are shown: it is the longest step, and others wait for its lock.
.cache/make/operators: $(STAMPS)/deepspeed | $(STAMPS)/lowtide
	@mkdir -p .cache/make
	@$(PY) -m lowtide.hosts.deepspeed_ops build
	@touch $@
