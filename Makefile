# Every target works from a fresh clone: the first one makes .venv, later ones find it ready and need no network.

SHELL := bash
VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
TRITON := $(shell grep '^triton==' constraints.txt)
PIP   := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --constraint $(VENV)/constraints.txt
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --dist loadgroup

# The oldest supported diffusers, from the floor that pyproject.toml states; it stands in a folder beside the pinned one.
OLDEST := $(shell sed -n 's/.*"diffusers>=\([0-9.]*\)".*/\1/p' pyproject.toml | head -n 1)
FLOOR  := $(VENV)/floor

# An extra index, for example one of CPU-only torch wheels. Empty: only the index that pip is set up with.
TORCH_INDEX_URL ?=

export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-floor lint bench bench-training compare study study-scratch gate bench-gpu tune-gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12        the interpreter .venv is made with (3.11 or newer; found by itself if not given)"
	@echo "  TORCH_INDEX_URL=<url>    where to look for torch as well. On Linux the usual torch wheel carries CUDA and is"
	@echo "                           large; without an NVIDIA GPU, give the index of PyTorch's CPU wheels here."

# Threads that spin while they wait make minutes of seconds when anything else runs on the machine.
demo: export OMP_WAIT_POLICY ?= PASSIVE
demo: $(STAMP) ## generate the same clip dense and sparse with a tiny model; writes out/
	@$(BIN)/vsparse demo

test: lint ## ruff, mypy and the tests (pairwise products, minutes)
	@echo "== pytest"
	@$(PYTEST) -m "not full"

test-all: lint ## ruff, mypy and every test (full products)
	@echo "== pytest, full products"
	@$(PYTEST)

test-floor: $(FLOOR)/.installed ## the host contracts with the oldest diffusers that is supported
	@echo "== pytest with diffusers $(OLDEST)"
	@PYTHONPATH=$(FLOOR) $(PYTEST) -m "not full" tests/integrations/test_lifecycle.py tests/integrations/test_steps.py

lint: $(STAMP) ## ruff and mypy
	@echo "== ruff"
	@$(BIN)/ruff check .
	@echo "== mypy"
	@$(BIN)/mypy

bench: $(STAMP) ## time block-sparse attention against dense attention on this machine
	@$(BIN)/python scripts/bench_cpu.py

bench-training: $(STAMP) ## memory and time of a training step, sparse against dense, here or on a GPU; writes out/training
	@$(BIN)/python scripts/bench_training.py

compare: $(STAMP) ## what each method's maps catch at which density, and the cost of choosing; writes out/compare
	@$(BIN)/python scripts/compare_methods.py

study: $(STAMP) ## quality of every method on the embedded model, free and fine-tuned (hours, resumable); writes out/study
	@$(BIN)/python scripts/study_methods.py

study-scratch: $(STAMP) ## VSA and VMoBA against dense from random weights, three seeds (hours, resumable); writes out/scratch
	@$(BIN)/python scripts/study_from_scratch.py

bench-gpu: $(STAMP) ## the same on a GPU, correctness first (under ten minutes); writes out/bench
	@$(BIN)/python scripts/bench_kernels.py

tune-gpu: $(STAMP) ## launch configurations on a GPU against those that ship; writes out/tune
	@$(BIN)/python scripts/tune_kernels.py

gate: $(STAMP) ## compile the kernels without a GPU and check registers, spills, occupancy
	@$(BIN)/python scripts/kernel_gate.py

clean: ## remove outputs, builds and caches; keeps .venv
	@rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@set -e; found=; \
	for python in $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11 python); do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "make: no Python 3.11 or newer found; name one: make PYTHON=..." >&2; exit 1; fi; \
	echo "[1/4] .venv with $$("$$found" --version)"; \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(FLOOR)/.installed: $(STAMP)
	@echo "[floor] diffusers $(OLDEST)"
	@rm -rf $(FLOOR)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --target $(FLOOR) --no-deps "diffusers==$(OLDEST)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --target $(FLOOR) httpx
	@touch $@

# torch first and alone, so that nothing after it can choose another build. A CUDA torch brings the triton it was
# built with; only where it brings none is ours installed, and ours must not constrain the rest.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@rm -f $@
	@grep -v '^triton==' constraints.txt > $(VENV)/constraints.txt
	@echo "[2/4] $(TORCH) ($$(nvidia-smi -L >/dev/null 2>&1 && echo an NVIDIA GPU is here || echo no NVIDIA GPU here))"
	@$(PIP) $(if $(TORCH_INDEX_URL),--extra-index-url "$(TORCH_INDEX_URL)") "$(TORCH)"
	@if $(BIN)/python -c 'import importlib.metadata as m, sys; sys.exit("triton" not in {d.name for d in m.distributions()})'; then \
	    echo "[3/4] triton is here already"; \
	elif [ "$$(uname -s)" = Linux ]; then \
	    echo "[3/4] $(TRITON)"; $(PIP) "$(TRITON)"; \
	else \
	    echo "[3/4] no triton for $$(uname -s): its kernels stay off"; \
	fi
	@echo "[4/4] vsparse with all extras"
	@$(PIP) --no-build-isolation --editable '.[all]'
	@touch $@
