# Two commands do everything on a machine with python3 >= 3.10 and a C++ compiler:
#
#   make bench    make test
#
# With a GPU, a torch with CUDA and nvcc, but no network: make gpu PYTHON=...
#
# Variables, given on the command line (make test VENV=... TORCH=...):
#   PYTHON        the interpreter that .venv is made from            python3
#   VENV          the environment to use; an existing one is kept    .venv
#   TORCH         what pip is asked for, when VENV is made           torch==2.13.0
#   CXX           the C++ compiler                                   c++, g++ or clang++
#   MAX_JOBS      compilations at a time                             number of cores
#   PYTEST_ARGS   passed to pytest by make test
#   BENCH_ARGS    passed to python -m benchmarks by make bench
#   SYSTEM_SITE   1: use the packages PYTHON has, download nothing
#   GPU_RESULTS   where make gpu puts logs and measurements          benchmarks/results/gpu
#   GPU_STEPS     which steps of .ci/gpu, in which order             first second
#
# On Linux, PyPI's torch brings several GB of CUDA packages. For the CPU build alone:
#   make test PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON      ?= python3
VENV        ?= $(if $(SYSTEM_SITE),.venv-system,.venv)
TORCH       ?= torch==2.13.0
MAX_JOBS    ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
PYTEST_ARGS ?=
BENCH_ARGS  ?=
SYSTEM_SITE ?=
GPU_RESULTS ?= benchmarks/results/gpu

ifeq ($(origin CXX),default)
CXX := $(shell for c in c++ g++ clang++; do command -v $$c >/dev/null 2>&1 && echo $$c && break; done)
endif

export CXX MAX_JOBS
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

BIN     := $(VENV)/bin
PY      := $(BIN)/python
CREATED := $(VENV)/.bnext-created
DEPS    := $(VENV)/.bnext-dependencies
# One stamp an environment: going back to another one builds again.
BUILT   := build/.built-for$(subst /,-,$(abspath $(VENV)))

# Folders are listed as well: their time changes when a file is deleted.
SOURCES   := $(shell find csrc \( -type d -o -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' \) 2>/dev/null)
CXX_FILES := $(sort $(filter %.h %.inl %.cpp %.cuh %.cu,$(SOURCES)))

# $(error) prints one line and stops; the shell runs once.
stop_if = $(if $(strip $(1)),$(error $(strip $(1))))
# The interpreter that will be used, and whether an environment has still to be made from it.
base    = $(if $(wildcard $(PY)),$(PY) have-venv,$(PYTHON) $(if $(SYSTEM_SITE),need-venv,need-venv-pip))

# A process of tests a core, where pytest-xdist is there: with SYSTEM_SITE it may not be.
in_parallel = $(shell $(PY) -c 'import xdist' 2>/dev/null && printf '%s' '-n $(MAX_JOBS) --dist worksteal')

.DEFAULT_GOAL := help
.PHONY: help build test bench numerics sanitize package mutation mutants instructions cuda-check cuda-model gpu lint \
        format clean tools FORCE
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Variables and their defaults: the first lines of the Makefile."

build: tools $(BUILT) ## build the extension in place (compiles only what changed)
	@echo "bnext._C is built for $(PY)"

test: tools $(BUILT) ## set up, build, run the tests
	@echo "build: the CUDA kernels for their emulation"
	@$(PY) tests/simt/build.py >/dev/null
	@OMP_WAIT_POLICY=passive $(PY) -m pytest $(in_parallel) $(PYTEST_ARGS)

mutation: tools $(BUILT) ## plant faults in the C++ and Python sources, one at a time; the tests must fail; a minute or two
	@$(PY) tests/mutation/run.py

mutants: tools $(BUILT) ## take each synchronisation out of the CUDA kernels; the emulated tests must fail
	@$(PY) tests/simt/mutants.py

instructions: tools $(BUILT) ## count the CPU kernels' instructions in valgrind, compare with the committed numbers
	@$(PY) tests/instructions/check.py

cuda-check: tools $(DEPS) ## compile the CUDA sources for three architectures, read registers and machine code
	@$(PY) .ci/cuda_check.py

cuda-model: tools $(DEPS) ## predict the times of the CUDA kernels from plans, instruction counts and latencies
	@$(PY) -m benchmarks.cuda.predict

sanitize: tools $(DEPS) ## the operators and the CPU kernels under AddressSanitizer and UBSan; ten minutes
	@.ci/sanitize $(PY) $(PYTEST_ARGS)

package: tools $(DEPS) ## sdist and wheel, and a smoke test of the wheel in an empty environment
	@.ci/package $(PY) '$(TORCH)'

bench: tools $(BUILT) ## set up, build, run the benchmark
	@$(PY) -m benchmarks $(BENCH_ARGS)

numerics: tools $(BUILT) ## set up, build, print the errors of bnext and of torch against float64
	@$(PY) -m benchmarks numerics

# The packages are PYTHON's; the kernels are built for the GPU that is there alone.
gpu: ## on a machine with a GPU, without a network: build, test, sanitise, measure
	@BNEXT_CUDA=1 TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)}" \
	  $(MAKE) build SYSTEM_SITE=1
	@.ci/gpu $(GPU_RESULTS) .venv-system/bin/python

lint: $(DEPS) ## ruff, mypy and clang-format, changing nothing
	@failed=; \
	$(PY) -m ruff check . || failed="$$failed ruff-check"; \
	$(PY) -m ruff format --check . || failed="$$failed ruff-format"; \
	$(PY) -m mypy bnext || failed="$$failed mypy"; \
	if [ -n "$(CXX_FILES)" ]; then \
	  $(BIN)/clang-format --dry-run -Werror $(CXX_FILES) && echo "clang-format: $(words $(CXX_FILES)) files as they should be" \
	    || failed="$$failed clang-format"; \
	fi; \
	[ -z "$$failed" ] || { echo "lint failed:$$failed (make format mends the layout)" >&2; exit 1; }

format: $(DEPS) ## lay out Python and C++ anew, mend what ruff can
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .
	@if [ -n "$(CXX_FILES)" ]; then $(BIN)/clang-format -i $(CXX_FILES); fi

clean: ## remove what was built, the caches, .venv
	rm -rf build dist bnext.egg-info bnext/_C*.so .venv .venv-system
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@for d in bnext tests benchmarks studies .ci; do \
	  if [ -d $$d ]; then find $$d -type d -name __pycache__ -prune -exec rm -rf {} +; fi; \
	done

# Before anything is downloaded, so that what is missing is said at once.
tools:
	@$(call stop_if,$(shell sh .ci/preflight $(base) $(or $(CXX),no-compiler)))

# The environment's folder of packages, for the shell.
PACKAGES = "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

# With SYSTEM_SITE there is no pip, as nothing is installed. PYTHON may be a virtual environment itself, whose packages
# --system-site-packages would pass by: a .pth line names them.
SHARE := import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))

$(PY):
	@$(call stop_if,$(shell sh .ci/preflight $(base)))
	@echo "environment: $(VENV), from $(PYTHON)"
	@rm -f $(CREATED) $(DEPS)
	@$(PYTHON) -m venv $(if $(SYSTEM_SITE),--system-site-packages --without-pip) $(VENV)
	@$(if $(SYSTEM_SITE),$(PYTHON) -c '$(SHARE)' >$(PACKAGES)/system-site.pth)
	@touch $(CREATED)

ifeq ($(SYSTEM_SITE),)
# torch comes first and is then held by a constraint: no other requirement can replace it.
# In an environment that was not made here, the torch that is there stays.
$(DEPS): pyproject.toml Makefile .ci/requirements.py | $(PY)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null
	@if [ -e $(CREATED) ] || ! $(PY) -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then \
	  echo "install: $(TORCH)"; \
	  if [ -t 1 ]; then quiet=; else quiet=-qq; fi; \
	  $(PY) -m pip install --no-compile $$quiet '$(TORCH)'; \
	fi
	@$(PY) -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >$(VENV)/constraints.txt
	@$(PY) .ci/requirements.py >$(VENV)/requirements.txt
	@echo "install: requirements of pyproject.toml, with its extras"
	@$(PY) -m pip install --no-compile -qq -c $(VENV)/constraints.txt -r $(VENV)/requirements.txt
	@# To bytecode, by all cores, where pip would take one. Some packages hold files of tests that are no valid Python.
	@$(PY) -m compileall -qq -j 0 $(PACKAGES) || true
	@touch $@
else
$(DEPS): pyproject.toml Makefile .ci/requirements.py | $(PY)
	@$(PY) .ci/requirements.py --check
	@touch $@
endif

# setup.py itself and not pip: pip builds in a temporary folder, so every build would start from nothing.
# A .pth file then does what an editable install does; egg_info gives the metadata.
$(BUILT): $(DEPS) setup.py $(SOURCES) $(if $(wildcard bnext/_C*.so),,FORCE)
	@echo "build: bnext._C, $(CXX), $(MAX_JOBS) at a time"
	@mkdir -p build && rm -f build/.built-for*
	@{ PATH="$(abspath $(BIN)):$$PATH" $(PY) setup.py -q egg_info build_ext --inplace 2>&1; echo $$? >build/.status; } \
	  | tee build/build.log | awk -f .ci/build-log.awk
	@[ "$$(cat build/.status)" = 0 ] || { echo "build failed; everything it printed: build/build.log" >&2; exit 1; }
	@$(PY) -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "bnext-source.pth").write_text("$(CURDIR)\n")'
	@touch $@

FORCE:
