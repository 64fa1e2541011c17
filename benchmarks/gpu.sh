#!/usr/bin/env bash
# On a machine with an NVIDIA GPU (Python 3.10 or newer, torch >= 2.11 with CUDA, nvcc): builds, tests on the GPU with
# whatever backends exist, times, and writes benchmarks/results/. Copies the results to $OUT where that is set.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

say() { printf '\n== %s\n' "$*"; }
"$PYTHON" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "gpu.sh: needs a visible NVIDIA GPU and a CUDA build of torch, found none")'
say "machine"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
"$PYTHON" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda)'
missing=$("$PYTHON" - <<'PY'
import importlib.util
wanted = ["pytest", "pytest_benchmark", "hypothesis", "lightning", "jsonargparse", "yaml", "matplotlib", "rich", "tensorboard", "ninja"]
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
tests=(tests/ops tests/groups tests/models)
case " $missing " in *" lightning "* | *" jsonargparse "*) ;; *) tests+=(tests/tasks) ;; esac
"$PYTHON" -m pytest -q "${tests[@]}"
say "benchmarks"
"$PYTHON" -m pytest -q benchmarks/test_ops.py --device cuda --save-results
case " $missing " in *" lightning "* | *" jsonargparse "*) ;; *) "$PYTHON" -m pytest -q benchmarks --device cuda --save-results ;; esac
if [ -n "${OUT:-}" ]; then cp benchmarks/results/* "$OUT"/; fi
