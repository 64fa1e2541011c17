#!/usr/bin/env bash
# On a machine with an NVIDIA GPU (Python 3.10 or newer, torch >= 2.11 with CUDA, nvcc): builds, tests on the GPU with
# whatever backends exist, times, and writes benchmarks/results/. Copies the results to $OUT where that is set.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

say() { printf '\n== %s\n' "$*"; }
"$PYTHON" - <<'PY'
import importlib.util, sys
if importlib.util.find_spec("torch") is None:
    sys.exit("gpu.sh: needs torch >= 2.11 with CUDA, found no torch; name another interpreter with PYTHON=...")
import torch
if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: needs a visible NVIDIA GPU and a CUDA build of torch, found none (torch {torch.__version__})")
PY
say "machine"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
"$PYTHON" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda)'
missing=$("$PYTHON" - <<'PY'
import importlib.util
wanted = ["pytest", "pytest_benchmark", "hypothesis", "lightning", "jsonargparse", "yaml", "matplotlib", "rich", "tensorboard", "torch_geometric", "torchmetrics", "ninja"]
print(*[name for name in wanted if importlib.util.find_spec(name) is None])
PY
)
if [ -n "$missing" ]; then
  echo "gpu.sh: missing Python packages: $missing (install them, or put them on PYTHONPATH)"
  case " $missing " in *" pytest "* | *" ninja "*) exit 1 ;; esac
fi
say "build"
PROBSYM_BUILD=1 "$PYTHON" setup.py build_ext --inplace
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -c 'import probsym_fast, json; print(json.dumps(probsym_fast.info(), indent=1))'
say "tests"
tests=(tests/ops tests/groups tests/models tests/distributions)
complete=yes
for name in lightning jsonargparse torch_geometric torchmetrics; do
  case " $missing " in *" $name "*) complete=no ;; esac
done
[ $complete = no ] || tests+=(tests/tasks)
"$PYTHON" -m pytest -q "${tests[@]}"
say "benchmarks"
if [ $complete = yes ]; then suites=(benchmarks); else suites=(benchmarks/test_ops.py); fi
"$PYTHON" -m pytest -q "${suites[@]}" --device cuda --save-results
if [ -n "${OUT:-}" ]; then cp benchmarks/results/* "$OUT"/; fi
