#!/usr/bin/env bash
# Builds, tests, checks memory and benchmarks on a machine with an NVIDIA GPU (Python 3.10+, torch >= 2.11 with CUDA).
#
#   benchmarks/gpu.sh [PART ...]      without an argument all parts, in this order
#
#   build         builds the kernels for this GPU (needs nvcc)
#   op-tests      GPU tests of the ops         model-tests   GPU tests of groups, models and tasks
#   sanitizer     finds memory errors and races, op by op (needs compute-sanitizer)
#   ops, steps, samples    benchmarks, each with a results file that is rewritten after every case
#
# On a machine lent for minutes, choose the parts that fit. A requested part that cannot run counts as a failure. The last
# lines list the parts that ran, failed and were skipped. Environment:
#   OUT             writes results to $OUT/benchmarks/results instead of benchmarks/results
#   WHEELS          a folder with wheels of packages that the machine lacks and cannot download
#   SELECT          selects tests and cases, like pytest's -k
#   SECONDS_EACH    seconds per benchmark case (1.5)
#   PYTHON          the interpreter (python3)       TORCH_CUDA_ARCH_LIST    GPUs to build for (only this one)
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${OUT:+$OUT/benchmarks/results}
RESULTS=${RESULTS:-benchmarks/results}
PARTS=(build op-tests model-tests sanitizer ops steps samples)
TRAINING="lightning jsonargparse yaml matplotlib rich torchmetrics timm torch_geometric"

wanted=("$@")
[ $# -gt 0 ] || wanted=("${PARTS[@]}")
for part in "${wanted[@]}"; do
  case " ${PARTS[*]} " in *" $part "*) ;; *) echo "gpu.sh: a part must be one of ${PARTS[*]}, got $part" >&2; exit 2 ;; esac
done

say() { printf '\n== %s (%s s)\n' "$*" "$SECONDS"; }
ask() { "$PYTHON" -c "$@"; }
if [ -n "${WHEELS:-}" ]; then
  carried=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --target "$carried" "$WHEELS"/*.whl
fi
export PYTHONPATH="$PWD${carried:+:$carried}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

ask 'import torch; assert torch.cuda.is_available()' 2>/dev/null || {
  echo "gpu.sh: needs torch with CUDA and a visible NVIDIA GPU, found none; PYTHON=... names another interpreter" >&2
  exit 1
}
say machine
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
ask 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda)'

needs() {  # the packages that a part needs
  case $1 in
    build) echo setuptools ninja ;;
    op-tests) echo pytest hypothesis ;;
    model-tests) echo pytest hypothesis tensorboard $TRAINING ;;
    sanitizer) echo pytest ;;
    ops) echo pytest pytest_benchmark ;;
    steps | samples) echo pytest pytest_benchmark $TRAINING ;;
  esac
}

lacking() {
  ask 'import importlib.util as u, sys; print(*(x for x in sys.argv[1:] if u.find_spec(x) is None))' $(needs "$1")
  case $1 in
    build) command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] || echo nvcc ;;
    sanitizer) [ -n "$sanitizer" ] || echo compute-sanitizer ;;
  esac
}
sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null || true)

run_tests() {
  local several=()
  [ -n "$(ask 'import importlib.util as u; print(u.find_spec("xdist") or "")')" ] && several=(-n 8)
  "$PYTHON" -m pytest -q -m gpu "${several[@]}" ${SELECT:+-k "$SELECT"} "$@"
}
run_benchmarks() {
  local part=$1
  shift
  "$PYTHON" -m pytest -q "$@" --device cuda --seconds "${SECONDS_EACH:-1.5}" --save-results --results "$RESULTS" \
    --part "$part" ${SELECT:+-k "$SELECT"}
}
run() {
  case $1 in
    build)
      export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(ask 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
      PROBSYM_BUILD=1 "$PYTHON" setup.py build_ext --inplace &&
        ask 'import probsym_fast, json; print(json.dumps(probsym_fast.info(), indent=1))'
      ;;
    op-tests) run_tests tests/ops tests/test_synchronisation.py ;;
    model-tests) run_tests tests/batches tests/groups tests/distributions tests/models tests/training tests/tasks ;;
    sanitizer)  # without torch's caching allocator, which would hide accesses outside a tensor
      local tool
      for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONDONTWRITEBYTECODE=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
          --target-processes all "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/test_sanitizer_case.py \
          ${SELECT:+-k "$SELECT"} || return
      done
      ;;
    ops) run_benchmarks ops benchmarks/test_ops.py benchmarks/test_graph_ops.py ;;
    steps) run_benchmarks steps benchmarks/test_steps.py benchmarks/test_passes.py ;;
    samples) run_benchmarks samples benchmarks/test_samples.py benchmarks/test_scaling.py ;;
  esac
}

ran=() failed=() skipped=()
for part in "${PARTS[@]}"; do
  case " ${wanted[*]} " in *" $part "*) ;; *) continue ;; esac
  missing=$(echo $(lacking "$part"))
  if [ -n "$missing" ]; then
    say "$part: skipped, missing: $missing"
    skipped+=("$part ($missing)")
    continue
  fi
  say "$part"
  if run "$part"; then ran+=("$part"); else failed+=("$part"); fi
done

say "done"
listed() { local IFS=,; echo "gpu.sh: $1: ${*:2}"; }
listed ran "${ran[@]:-none}"
listed failed "${failed[@]:-none}"
listed skipped "${skipped[@]:-none}"
[ $((${#failed[@]} + ${#skipped[@]})) -eq 0 ]
