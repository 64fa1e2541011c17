#!/usr/bin/env bash
# Builds, tests, checks memory and benchmarks on a machine with an NVIDIA GPU (Python 3.10+, torch >= 2.11 with CUDA).
#
#   benchmarks/gpu.sh [PART ...]      without an argument all parts, in this order
#
#   build             builds the kernels for this GPU (needs nvcc)
#   op-tests          GPU tests of the ops          model-tests   GPU tests of groups, models and tasks
#   sanitizer         finds memory errors and races, op by op (needs compute-sanitizer)
#   benchmarks, each with a results file that is rewritten after every case:
#   ops, graph-ops, graph-ops-bf16   every op against its reference and torch.compile of it
#   images                           tokens of turned images, and training steps of a ViT on them
#   passes, passes-others            backbones in one pass: those of n-body, and the others
#   steps, vision, vision-compiled   training steps and inference: without ViTs, with them, with them compiled
#   samples, scaling                 time and memory against S; the part of one device among many
#
# Each command of a part is stopped after LIMIT seconds, and its part then counts as failed; rows so far are kept. docs/gpu.md
# has the predicted minutes of each part. On a machine lent for minutes, choose the parts that fit. A requested part that
# cannot run counts as a failure. The last lines list the parts that ran, failed and were skipped. Environment:
#   OUT             writes results to $OUT/benchmarks/results instead of benchmarks/results
#   WHEELS          a folder with wheels of packages that the machine lacks and cannot download
#   SELECT          selects tests and cases, like pytest's -k
#   SECONDS_EACH    seconds per benchmark case (1.5)       LIMIT    seconds per command (600)
#   PROCESSES       of the tests (8)                COMPILED    0 leaves out torch.compile, which takes minutes (1)
#   PYTHON          the interpreter (python3)       TORCH_CUDA_ARCH_LIST    GPUs to build for (only this one)
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${OUT:+$OUT/benchmarks/results}
RESULTS=${RESULTS:-benchmarks/results}
PARTS=(build op-tests model-tests sanitizer ops graph-ops graph-ops-bf16 images passes passes-others steps vision)
PARTS+=(vision-compiled samples scaling)
LIMIT=${LIMIT:-600}
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
    ops | graph-ops* | passes*) echo pytest pytest_benchmark ;;
    *) echo pytest pytest_benchmark $TRAINING ;;
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

limited() {
  local status=0
  timeout -k 20 "$LIMIT" "$@" || status=$?
  [ "$status" -ne 124 ] || echo "gpu.sh: stopped after $LIMIT s: SELECT some of the cases, or raise LIMIT"
  return "$status"
}
selected() {  # -k of a part's own selection (or nothing) and of SELECT
  local own=${1:-} both
  both=${own:+($own)}${SELECT:+${own:+ and }($SELECT)}
  [ -z "$both" ] || printf '%s\n' -k "$both"
}
run_tests() {
  local several=() chosen=()
  [ -n "$(ask 'import importlib.util as u; print(u.find_spec("xdist") or "")')" ] && several=(-n "${PROCESSES:-8}")
  mapfile -t chosen < <(selected)
  limited "$PYTHON" -m pytest -q -m gpu "${several[@]}" "${chosen[@]}" "$@"
}
run_benchmarks() {  # part, selection, files
  local part=$1 chosen=()
  mapfile -t chosen < <(selected "$2")
  [ "${COMPILED:-1}" != 0 ] || chosen+=(--without-compiled)
  shift 2
  limited "$PYTHON" -m pytest -q "$@" --device cuda --seconds "${SECONDS_EACH:-1.5}" --save-results --results "$RESULTS" \
    --part "$part" "${chosen[@]}"
}
run() {
  case $1 in
    build)
      export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(ask 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
      PROBSYM_BUILD=1 limited "$PYTHON" setup.py build_ext --inplace &&
        ask 'import probsym_fast, json; print(json.dumps(probsym_fast.info(), indent=1))'
      ;;
    op-tests) run_tests tests/ops tests/test_synchronisation.py ;;
    model-tests) run_tests tests/batches tests/groups tests/distributions tests/models tests/programs tests/training tests/tasks ;;
    sanitizer)  # without torch's caching allocator, which would hide accesses outside a tensor
      local tool chosen=()
      mapfile -t chosen < <(selected)
      for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONDONTWRITEBYTECODE=1 limited "$sanitizer" --tool "$tool" --error-exitcode 9 \
          --target-processes all "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/test_sanitizer_case.py \
          "${chosen[@]}" || return
      done
      ;;
    ops) run_benchmarks ops "" benchmarks/test_ops.py ;;
    graph-ops) run_benchmarks graph-ops "not bfloat16" benchmarks/test_graph_ops.py ;;
    graph-ops-bf16) run_benchmarks graph-ops-bf16 bfloat16 benchmarks/test_graph_ops.py ;;
    images) run_benchmarks images "" benchmarks/test_images.py ;;
    passes) run_benchmarks passes n-body benchmarks/test_passes.py ;;
    passes-others) run_benchmarks passes-others "not n-body" benchmarks/test_passes.py ;;
    steps) run_benchmarks steps "not ViT and not dead_tokens and not batches" benchmarks/test_steps.py ;;
    vision) run_benchmarks vision "ViT and eager or dead_tokens or batches" benchmarks/test_steps.py ;;
    vision-compiled) run_benchmarks vision-compiled "ViT and compiled" benchmarks/test_steps.py ;;
    samples) run_benchmarks samples "" benchmarks/test_samples.py ;;
    scaling) run_benchmarks scaling "" benchmarks/test_scaling.py ;;
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
