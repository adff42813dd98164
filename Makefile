# make demo and make test do everything on a machine with Python 3.10+, g++ and make.
#
# PYTHON=python3.12     the Python that makes .venv (ignored inside an active virtualenv)
# PIP_FLAGS=...         passed to pip install, for instance an index with CPU-only torch wheels
# MAX_JOBS=2            compilers at a time          TEST_JOBS=2    pytest processes
# FLASH_ATTN_EXT_CUDA=0 no CUDA kernels, even where there is nvcc (build_tools/cuda.py has more)
# PYTEST_ARGS=...  BENCH_ARGS=...  DEMO_ARGS=...     passed on

# Torch's modules are compiled once, not by every Python that starts, also where containers ask for no bytecode.
export PYTHONDONTWRITEBYTECODE :=

PYTHON ?= python3
PIP_FLAGS ?=
TEST_JOBS ?= $(shell nproc 2>/dev/null || echo 2)

ifdef VIRTUAL_ENV
ENV := $(VIRTUAL_ENV)
else
ENV := $(CURDIR)/.venv
endif
PY := $(ENV)/bin/python
STAMPS := $(ENV)/.flash_attn_ext
CXX_SOURCES = $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' 2>/dev/null)

.PHONY: setup build demo test bench docs test-abi test-aarch64 test-avx512 test-sanitize lint format clean
.DEFAULT_GOAL := setup

$(PY):
	@command -v $(PYTHON) >/dev/null || \
	  { echo "error: $(PYTHON) was not found: install Python 3.10 or newer, or set PYTHON."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: flash_attn_ext needs Python 3.10 or newer, and $$($(PYTHON) --version) was found: set PYTHON."; exit 1; }
	@$(PYTHON) -m venv $(ENV) || \
	  { rm -rf $(ENV); echo "error: $(PYTHON) cannot make a virtual environment: install its venv package (Debian, Ubuntu: apt install python3-venv)."; exit 1; }

# A stamp is newer than the files that it depends on once its step has been done.
# --no-compile: Python compiles what it imports; all of torch at once would take half a minute.
$(STAMPS)/build: requirements-build.txt | $(PY)
	$(PY) -m pip install --no-compile $(PIP_FLAGS) -r requirements-build.txt
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/dev: requirements-dev.txt $(STAMPS)/build
	$(PY) -m pip install --no-compile $(PIP_FLAGS) -r requirements-build.txt -r requirements-dev.txt
	@mkdir -p $(STAMPS) && touch $@

# Compiles what has changed; ninja knows what that is.
build: $(STAMPS)/build
	$(PY) -m build_tools.native

$(STAMPS)/installed: pyproject.toml setup.py $(STAMPS)/dev
	$(PY) -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	@mkdir -p $(STAMPS) && touch $@

# Compiling goes on while pip fetches the rest.
setup:
	@$(MAKE) --no-print-directory -j 2 build $(STAMPS)/dev
	@$(MAKE) --no-print-directory $(STAMPS)/installed

# The demo runs on the CPU: where there is no card it does not wait for CUDA kernels, which `make setup` builds.
ifeq ($(wildcard /dev/nvidiactl flash_attn_ext/lib/libflash_attn_ext_cuda.so),)
demo: export FLASH_ATTN_EXT_CUDA ?= 0
endif
demo: setup
	$(PY) examples/demo.py $(DEMO_ARGS)

test: setup
	$(PY) -m pytest -n $(TEST_JOBS) $(PYTEST_ARGS)

bench: setup
	$(PY) -m benchmarks $(BENCH_ARGS)

# The guide, as pages in build/docs.
docs: setup
	$(PY) -m pip install $(PIP_FLAGS) -r requirements-docs.txt
	$(PY) -m mkdocs build --quiet

# One binary, built against the oldest supported torch, passes the tests under it and under this one.
test-abi: $(STAMPS)/dev
	$(PY) -m build_tools.abi $(ABI_ARGS)

# The NEON kernels: cross-compiled, run under user-mode emulation.
test-aarch64:
	tests/cpp/run_aarch64.sh $(AARCH64_ARGS)

# The AVX-512 kernels on a processor that has none: its instructions made of AVX2's.
test-avx512:
	tests/cpp/run_avx512.sh $(AVX512_ARGS)

# The C++ tests under the address and undefined-behaviour sanitizers.
test-sanitize:
	tests/cpp/run_sanitize.sh $(SANITIZE_ARGS)

lint: $(STAMPS)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(ENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(STAMPS)/dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(ENV)/bin/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf build dist flash_attn_ext/_C.*.so flash_attn_ext/lib *.egg-info
