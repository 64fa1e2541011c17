# `make demo` and `make test` set up what they need in .venv, then run. PYTHON is the interpreter to set up from.
PYTHON ?= python3
BIN = .venv/bin
SANITIZED = build/sanitized
FUZZ = 2000

.PHONY: demo test bench lint sanitize clean
demo: .venv/ready
	$(BIN)/probsym fit -c nbody/demo --folder runs/demo-$$(date +%Y%m%d-%H%M%S)

test: .venv/ready
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest -q

bench: .venv/ready
	$(BIN)/python -m pytest benchmarks -q --save-results

lint: .venv/ready
	$(BIN)/python -m ruff check .

# The CPU kernels under the address and undefined-behaviour sanitizers, in a copy of the package of their own.
sanitize: .venv/ready
	mkdir -p $(SANITIZED)
	cp -R probsym_fast csrc tests setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	rm -f $(SANITIZED)/probsym_fast/_C*.so
	cd $(SANITIZED) && PROBSYM_SANITIZE=1 PROBSYM_BUILD=1 PROBSYM_CUDA=0 $(abspath $(BIN))/python setup.py build_ext --inplace
	cd $(SANITIZED) && export PYTHONPATH=$$PWD ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" && \
		$(abspath $(BIN))/python -m tests.ops.fuzz --cases $(FUZZ) && \
		$(abspath $(BIN))/python -m pytest -q -p no:cacheprovider tests/ops --ignore tests/ops/test_triton.py -m "not slow"

# The kernels build against the torch of this environment, hence no build isolation.
.venv/ready: pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"probsym_fast needs Python 3.10 or newer, this is {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel ninja pybind11
	$(BIN)/python -m pip install --quiet "torch>=2.11" numpy
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,test]"
	touch $@

clean:
	rm -rf .venv build *.egg-info probsym_fast/_C*.so
