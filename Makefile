# `make demo` and `make test` are the two commands; each makes its own virtual environment first.
#   PYTHON=/path/to/python3.11   which interpreter to make the environment from
#   VENV=dir                     where the environment lives (default .venv)
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?=
VENV ?= .venv
CONSTRAINTS := requirements/constraints.txt
TORCH := $(shell grep '^torch==' $(CONSTRAINTS))
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
RUNS ?= runs
TRAIN ?=

DEMO_IMAGE ?= ppcr/assets/samples/scene_0.png
DEMO_EXPRESSION ?= all red spheres behind the green cube
DEMO_OUTPUT ?= outputs/demo

.PHONY: help demo test lint bench train-mllm train-segmenter clean distclean

help:
	@echo "make demo             build the bundle, then one picture and one expression to masks"
	@echo "make test             ruff, mypy and the whole test suite"
	@echo "make lint             ruff and mypy alone"
	@echo "make bench            latency and accuracy of the bundle"
	@echo "make train-mllm       train the prompt model from nothing (resumes after a kill)"
	@echo "make train-segmenter  train the segmenter from nothing (resumes after a kill)"
	@echo "make clean            remove what the commands made; make distclean: the environment too"

# A name on PATH proves nothing (a version manager's shim may point nowhere): run each candidate.
$(VENV)/.made:
	@probe='import ensurepip, sys, venv; raise SystemExit(not (3, 11) <= sys.version_info[:2] < (3, 13))'; \
	for python in $(or $(PYTHON),python3.12 python3.11 python3); do \
	  if "$$python" -c "$$probe" >/dev/null 2>&1; then \
	    echo "environment: $(VENV), from $$python ($$("$$python" --version))"; \
	    "$$python" -m venv "$(VENV)"; \
	    touch "$@"; \
	    exit 0; \
	  fi; \
	done; \
	echo "make: no working Python 3.11 or 3.12 with venv and ensurepip (tried: $(or $(PYTHON),python3.12 python3.11 python3))." >&2; \
	echo "make: install one (on Debian and Ubuntu: python3.11 and python3.11-venv), or say which: make PYTHON=/path/to/python3.11" >&2; \
	exit 1

# torch goes in first and by itself, so that an index that serves a CPU build of it is not overruled.
$(VENV)/.torch: $(VENV)/.made $(CONSTRAINTS)
	$(PIP) install -c $(CONSTRAINTS) $(TORCH)
	@touch $@

$(VENV)/.export: $(VENV)/.torch pyproject.toml
	$(PIP) install -c $(CONSTRAINTS) -e '.[export,openvino]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install -c $(CONSTRAINTS) -e '.[export,openvino,train,tensorrt,dev]'
	@touch $@ $(VENV)/.export

demo: $(VENV)/.export
	$(PY) export/build_engines.py
	$(PY) runtime/infer.py --image $(DEMO_IMAGE) --expression "$(DEMO_EXPRESSION)" --output $(DEMO_OUTPUT)
	@test -s $(DEMO_OUTPUT)/overlay.png

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: lint
	$(PY) -m pytest

bench: $(VENV)/.export
	$(PY) benchmarks/latency.py
	$(PY) benchmarks/accuracy.py --split test
	$(PY) benchmarks/accuracy.py --split compositional
	$(PY) benchmarks/accuracy.py --split crowded

# Both resume where they were stopped; TRAIN="--device cpu" and the like goes through to the command.
train-mllm: $(VENV)/.dev
	$(PY) -m ppcr.training.mllm --output $(RUNS)/mllm $(TRAIN)

train-segmenter: $(VENV)/.dev
	$(PY) -m ppcr.training.segmenter --mllm $(RUNS)/mllm/mllm --output $(RUNS)/segmenter $(TRAIN)

clean:
	rm -rf bundles outputs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf .venv
