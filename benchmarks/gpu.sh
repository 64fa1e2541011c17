#!/usr/bin/env bash
# On a machine with an NVIDIA GPU (Python 3.10 or newer, torch >= 2.11 with CUDA): builds, tests, checks memory and times.
#
#   benchmarks/gpu.sh [PART ...]      all parts without an argument, in this order
#
#   build         the kernels for the GPU that is there (needs nvcc)
#   op-tests      the tests of the ops that use the GPU         model-tests   those of groups, models and tasks
#   sanitizer     memory errors and races, op by op (needs compute-sanitizer)
#   ops, steps, samples    benchmarks, each with a results file that is written again after every case
#
# For machines lent for minutes: take the parts that fit. A part that was asked for and cannot run is a failure, too; the last
# lines say which parts ran, failed and were skipped. Environment:
#   OUT             results go to $OUT/benchmarks/results in place of benchmarks/results
#   WHEELS          a folder of wheels for packages that the machine lacks and cannot fetch
#   SELECT          of the tests and cases, as pytest's -k takes it
#   SECONDS_EACH    time given to each case of a benchmark (1.5)
#   PYTHON          the interpreter (python3)       TORCH_CUDA_ARCH_LIST    what to build for (this GPU alone)
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

needs() {  # the packages without which a part would not be whole
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
    sanitizer)  # torch's own allocator would hide accesses beyond a tensor
      local tool
      for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONDONTWRITEBYTECODE=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
          --target-processes all "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/test_sanitizer_case.py \
          ${SELECT:+-k "$SELECT"} || return
      done
      ;;
    ops) run_benchmarks ops benchmarks/test_ops.py benchmarks/test_graph_ops.py ;;
    steps) run_benchmarks steps benchmarks/test_steps.py ;;
    samples) run_benchmarks samples benchmarks/test_samples.py benchmarks/test_scaling.py ;;
  esac
}

ran=() failed=() skipped=()
for part in "${PARTS[@]}"; do
  case " ${wanted[*]} " in *" $part "*) ;; *) continue ;; esac
  missing=$(echo $(lacking "$part"))
  if [ -n "$missing" ]; then
    say "$part: skipped, for want of $missing"
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
