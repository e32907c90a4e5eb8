# make demo · test · test-long · fuzz · bench · lint · types · docs · dist · info: each makes .venv by itself when it is
# missing or out of date.
#
#   make test              what CI runs: every test but those marked `long`, of drawn suites a sample; under 20 minutes
#   make test-long         all that make test leaves out, then make fuzz
#   make fuzz SECONDS=600  drawn calls of every op for so many seconds (default: 60)
#   make docs              the documentation as a site in build/site; make docs-serve shows it while pages are written
#   make types             mypy over the public modules of both packages
#   make dist              source archives of both packages and the wheels made from them, in dist/
#
#   PYTHON=python3.12      interpreter of the environment (default: python3)
#   TORCH="torch==2.13.0"  what pip installs as torch. Default: the plain package where there is an NVIDIA GPU, else
#                          the version below, as a CPU build if pip's index offers one (set PIP_EXTRA_INDEX_URL to
#                          PyTorch's CPU index where yours does not; the CUDA build works too, it is only larger).
#   WORKERS=4              processes of make test and test-long, about 1 GB each (default: one a core, 16 at most)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1)
TORCH ?= $(if $(HAS_GPU),torch>=2.11,torch==2.13.0)
# nproc would take OMP_NUM_THREADS for the number of cores.
WORKERS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc); echo $$((n < 16 ? n : 16)))
SECONDS ?= 60
SOURCES := $(wildcard csrc/*.cpp csrc/*/*.* csrc/*/*/*.*)
# The variable silences an announcement of mkdocs-material.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-long fuzz bench lint types docs docs-serve dist info clean
.DELETE_ON_ERROR:

demo: $(VENV)/built
	$(BIN)/vidmem demo -o demo_output

test: $(VENV)/built
	$(PYTEST) -m "not long"

test-long: $(VENV)/built build/triton-3.6.0
	$(PYTEST) -m long
	$(if $(wildcard tests/fuzz.py),$(MAKE) fuzz)

fuzz: $(VENV)/built
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS)

bench: $(VENV)/built
	$(BIN)/python benchmarks/run.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/docs
	$(MKDOCS) build --strict

docs-serve: $(VENV)/docs
	$(MKDOCS) serve --watch vidmem_kernels --watch python

types: $(VENV)/installed
	$(BIN)/mypy

# Each wheel is made from its source archive alone; --no-isolation: by the torch that is here, not one more download.
dist: $(VENV)/installed
	rm -rf dist
	$(BIN)/pyproject-build --no-isolation --outdir dist .
	$(BIN)/pyproject-build --no-isolation --outdir dist python

info: $(VENV)/built
	$(BIN)/vidmem info

$(VENV)/installed: pyproject.toml python/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "vidmem_kernels needs Python 3.10 or newer; call make PYTHON=/path/to/one"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)" "setuptools>=64" wheel pybind11 numpy
	VIDMEM_BUILD=0 $(PIP) install --quiet --no-build-isolation -e . -e "./python[dev]"
	touch $@

$(VENV)/docs: $(VENV)/installed
	VIDMEM_BUILD=0 $(PIP) install --quiet --no-build-isolation -e ".[docs]"
	touch $@

# Triton of the oldest torch that is supported: every kernel is compiled by it too.
build/triton-3.6.0: $(VENV)/installed
	$(PIP) install --quiet --no-deps --target $@ triton==3.6.0

# Apart from the packages, so that an edit of csrc/ compiles only what changed.
$(VENV)/built: $(VENV)/installed setup.py $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@$(BIN)/python -c "import vidmem_kernels"
	@# Not marked as built without the library: the next make tries again, perhaps with a compiler.
	@if ls vidmem_kernels/_C*.so >/dev/null 2>&1; then touch $@; fi

clean:
	rm -rf $(VENV) build dist python/build vidmem_kernels/_C*.so *.egg-info python/*.egg-info
