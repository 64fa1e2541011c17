# `make demo` and `make test` set up .venv first. PYTHON is the interpreter to create it with.
PYTHON ?= python3
BIN = .venv/bin
# -qq: only errors; pip's warnings are about its own configuration.
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check
LOG = .venv/kernels.log
KERNELS = $(BIN)/python setup.py build_ext --inplace > $(LOG) 2>&1
SANITIZED = build/sanitized
FUZZ = 2000
WORKERS = 2
TRITON = 3.6.0
OLDEST = 2.11.0

.PHONY: demo test bench wheel aarch64 oldest lint types docs figures interpret sanitize clean
# Without a GPU the demo skips the kernels of csrc/cuda: nvcc takes minutes.
demo: export PROBSYM_CUDA ?= $(if $(wildcard /dev/nvidia0),1,0)
demo: .venv/ready
	$(BIN)/probsym fit -c nbody/demo --folder runs/demo-$$(date +%Y%m%d-%H%M%S)

# The tests are collected first: with workers an import that fails would be reported only after half an hour.
test: .venv/complete
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format -q --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -qq --collect-only > .venv/tests.log || { cat .venv/tests.log; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations 30 --durations-min 4

bench: .venv/complete
	$(BIN)/python -m pytest benchmarks -q --save-results

lint: .venv/ready
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format -q --check .

# A wheel that needs no compiler, in dist/: for this Python, and for every torch from 2.11 on.
wheel: .venv/ready
	PROBSYM_BUILD=1 $(BIN)/python -m pip wheel -qq --disable-pip-version-check --no-build-isolation --no-deps -w dist .

# The documentation site in build/site, with the packages of the extra docs; a link that leads nowhere ends it.
docs: .venv/ready
	$(PIP) "mkdocs-material>=9.6" "mkdocstrings[python]>=1.0"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Shows that the CPU kernels compile for aarch64, with the compiler of the package ziglang: nothing is linked or run.
aarch64: .venv/ready
	$(PIP) ziglang
	mkdir -p build/aarch64
	include=$$($(BIN)/python -c 'import sysconfig, torch; print(*("-I" + x for x in (torch.__path__[0] + "/include", sysconfig.get_path("include"))))'); \
	for file in $(filter-out csrc/autograd.cpp,$(wildcard csrc/*.cpp csrc/cpu/*.cpp)); do \
		$(BIN)/python -m ziglang c++ -target aarch64-linux-gnu.2.28 -O3 -std=c++17 -fPIC -DTORCH_TARGET_VERSION=0x020b000000000000 \
			-Icsrc $$include -c $$file -o build/aarch64/$$(basename $$file).o || exit 1; \
	done

# Shows that the CPU kernels compile with the headers of the oldest torch, in C++17: nothing is linked or run.
oldest: .venv/ready
	$(PIP) --no-deps --target build/torch-$(OLDEST) torch==$(OLDEST)
	include=$$($(BIN)/python -c 'import sysconfig, pybind11; print("-I" + pybind11.get_include(), "-I" + sysconfig.get_path("include"))'); \
	for file in $(filter-out csrc/autograd.cpp,$(wildcard csrc/*.cpp csrc/cpu/*.cpp)); do \
		c++ -std=c++17 -fsyntax-only -Wno-psabi -DTORCH_TARGET_VERSION=0x020b000000000000 -DTORCH_EXTENSION_NAME=_C \
			-Icsrc $$include -Ibuild/torch-$(OLDEST)/torch/include $$file || exit 1; \
	done

# The figures of the documentation, which are checked in.
figures: .venv/ready
	for name in overview soft_permutation tokens clouds results; do $(BIN)/python docs/figures/$$name.py || exit 1; done

types: .venv/ready
	$(BIN)/python -m mypy

# The Triton kernels under the interpreter of another triton: make interpret TRITON=3.6.0
interpret: .venv/ready
	$(PIP) --no-deps --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=build/triton-$(TRITON) TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -p no:cacheprovider tests/ops/triton/interpreted

# Tests the CPU kernels under the address and undefined-behaviour sanitizers, in a copy of the package.
sanitize: .venv/ready
	mkdir -p $(SANITIZED)
	cp -R probsym_fast csrc tests setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	rm -f $(SANITIZED)/probsym_fast/_*.so
	cd $(SANITIZED) && PROBSYM_SANITIZE=1 PROBSYM_BUILD=1 PROBSYM_CUDA=0 $(abspath $(BIN))/python setup.py build_ext --inplace
	cd $(SANITIZED) && export PYTHONPATH=$$PWD ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" && \
		$(abspath $(BIN))/python -m tests.ops.fuzz --cases $(FUZZ) && \
		$(abspath $(BIN))/python -m pytest -q -p no:cacheprovider tests/ops --ignore tests/ops/triton -m "not slow"

# The kernels build against the torch of this environment, hence no build isolation. Every step can be repeated: an
# interrupted set-up continues, and a change in csrc/ rebuilds only the kernels.
.venv/ready: pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 10) and sys.exit("probsym_fast needs Python 3.10 or newer; %s is %d.%d: make PYTHON=..." % (sys.executable, v[0], v[1]))'
	@echo "Setting up .venv: up to 6 GB on disk"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@echo "1/2 PyTorch: up to 3 GB to download"
	@$(PIP) "pip>=23" "setuptools>=77" wheel ninja pybind11
	@$(PIP) "torch>=2.11" numpy
	@echo "2/2 packages for experiments and tests: 0.3 GB to download; meanwhile the kernels: a minute on two cores, five with those for GPUs"
	@$(KERNELS) & kernels=$$!; \
		PROBSYM_BUILD=0 $(PIP) --no-build-isolation -e ".[train,test]" || { kill $$kernels 2>/dev/null; exit 1; }; \
		wait $$kernels || { cat $(LOG); exit 1; }
	@$(BIN)/python -c 'import probsym_fast as psf; print("Ready:", psf.info()["extension"]["problem"] or "the kernels are compiled. Next: make demo, make test, .venv/bin/probsym info")'
	@touch $@

# With the kernels for GPUs too, where nvcc is installed.
.venv/complete: .venv/ready
	@$(BIN)/python -c 'import shutil, sys, probsym_fast as psf; sys.exit(shutil.which("nvcc") is not None and psf.info()["extension"]["gpu_architectures"] is None)' || { \
		echo "Compiling the kernels for GPUs: four minutes on two cores"; $(KERNELS) || { cat $(LOG); exit 1; }; }
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info probsym_fast/_*.so
