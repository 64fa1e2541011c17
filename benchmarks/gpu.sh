#!/usr/bin/env bash
# On a machine with an NVIDIA GPU (Python 3.10 or newer, torch >= 2.11 with CUDA, nvcc): builds, tests on the GPU with
# whatever backends exist, checks memory, times, and writes benchmarks/results/. Copies the results to $OUT where that is set.
#
#   benchmarks/gpu.sh [build] [tests] [sanitizer] [ops] [steps] [samples]     all of them without an argument
#
# The parts are for machines lent for minutes: build comes first on a fresh one, ops, steps and samples write results files of
# their own. SECONDS_EACH (1.5): time given to each case of a benchmark. SELECT: of the tests and cases, as pytest's -k takes it.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SECONDS_EACH=${SECONDS_EACH:-1.5}
PARTS=(build tests sanitizer ops steps samples)
parts=("$@")
[ $# -gt 0 ] || parts=("${PARTS[@]}")
for part in "${parts[@]}"; do
  case " ${PARTS[*]} " in *" $part "*) ;; *) echo "gpu.sh: a part must be one of ${PARTS[*]}, got $part" >&2; exit 2 ;; esac
done

say() { printf '\n== %s (%s s)\n' "$*" "$SECONDS"; }
wanted() { case " ${parts[*]} " in *" $1 "*) true ;; *) false ;; esac; }
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
wanted = ["pytest", "pytest_benchmark", "hypothesis", "lightning", "jsonargparse", "yaml", "matplotlib", "rich", "tensorboard", "torch_geometric", "torchmetrics", "timm", "ninja"]
print(*[name for name in wanted if importlib.util.find_spec(name) is None])
PY
)
if [ -n "$missing" ]; then
  echo "gpu.sh: missing Python packages: $missing (install them, or put them on PYTHONPATH)"
  case " $missing " in *" pytest "* | *" ninja "*) exit 1 ;; esac
fi
complete=yes
for name in lightning jsonargparse torch_geometric torchmetrics timm; do
  case " $missing " in *" $name "*) complete=no ;; esac
done
select=()
[ -z "${SELECT:-}" ] || select=(-k "$SELECT")
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=()

if wanted build; then
  say "build"
  PROBSYM_BUILD=1 "$PYTHON" setup.py build_ext --inplace
  "$PYTHON" -c 'import probsym_fast, json; print(json.dumps(probsym_fast.info(), indent=1))'
fi

if wanted tests; then
  say "tests"
  tests=(tests/ops tests/groups tests/models tests/distributions tests/test_synchronisation.py)
  [ $complete = no ] || tests+=(tests/tasks)
  # the Triton kernels run here: their interpreter and their compilation for other GPUs are for machines without one
  "$PYTHON" -m pytest -q "${tests[@]}" --deselect tests/ops/test_triton.py::test_kernels_under_the_interpreter \
    --deselect tests/ops/test_triton.py::test_compiles_without_spills ${select[@]+"${select[@]}"} || failed+=(tests)
fi

if wanted sanitizer; then
  sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2>/dev/null || true)
  if [ -z "$sanitizer" ]; then
    say "sanitizer: skipped, compute-sanitizer is neither on the PATH nor in ${CUDA_HOME:-/usr/local/cuda}/bin"
  else
    for tool in memcheck racecheck; do
      say "sanitizer: $tool"
      # torch's own allocator would hide accesses beyond a tensor
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONDONTWRITEBYTECODE=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
        --target-processes all "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/test_sanitizer_case.py || failed+=("$tool")
    done
  fi
fi

if wanted ops; then
  say "ops"
  suites=(benchmarks/test_ops.py)
  [ $complete = no ] || suites+=(benchmarks/test_graph_ops.py)
  "$PYTHON" -m pytest -q "${suites[@]}" --device cuda --seconds "$SECONDS_EACH" --save-results --part ops ${select[@]+"${select[@]}"} || failed+=(ops)
fi

for part in steps samples; do
  wanted $part || continue
  if [ $complete = no ]; then
    say "$part: skipped, they need the packages named above"
    continue
  fi
  say "$part"
  suites=(benchmarks/test_steps.py)
  [ $part = steps ] || suites=(benchmarks/test_samples.py benchmarks/test_scaling.py)
  "$PYTHON" -m pytest -q "${suites[@]}" --device cuda --seconds "$SECONDS_EACH" --save-results --part $part ${select[@]+"${select[@]}"} || failed+=($part)
done

if [ -n "${OUT:-}" ]; then
  find benchmarks/results -maxdepth 1 \( -name '*-ops.*' -o -name '*-steps.*' -o -name '*-samples.*' \) -exec cp {} "$OUT"/ \;
fi
say "done"
if [ ${#failed[@]} -gt 0 ]; then echo "gpu.sh: failed: ${failed[*]}" >&2; exit 1; fi
