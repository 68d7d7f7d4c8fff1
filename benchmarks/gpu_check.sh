#!/usr/bin/env bash
# All that needs a GPU, in one call of some minutes; what fails is said, and the rest goes on.
#
#   benchmarks/gpu_check.sh DATA TIMM
#
# DATA: a prepared data set. TIMM: a folder with timm's train.py (a checkout).
# What is timed on two cores runs beside the tests, on cores of its own; what is timed on the GPU runs alone.
set -uo pipefail
cd "$(dirname "$0")/.."
DATA="$1" TIMM="$2"
LOGS="${OUT:-$(mktemp -d)}"
PYTHON="${PYTHON:-python3}"
TOTAL="$(nproc)"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

part() { # NAME SECONDS COMMAND...: its output into a file; shown as a whole at the end of the part
  local name="$1" limit="$2" began="$SECONDS"
  shift 2
  timeout "$limit" "$@" >"$LOGS/$name.log" 2>&1
  echo "exit code $? after $((SECONDS - began)) s" >>"$LOGS/$name.log"
}

show() {
  printf '\n===== %s\n' "$1"
  tail -n "${2:-40}" "$LOGS/$1.log"
}

OTHERS="0-$((TOTAL - 3))" OWN="$((TOTAL - 2)),$((TOTAL - 1))"
if [ "${SKIP_CPU:-}" = "" ]; then
  CUDA_VISIBLE_DEVICES="" part two_cores 150 taskset -c "$OWN" "$PYTHON" benchmarks/checkpoint_cost.py \
    --data "$DATA" --ranks 2 --rounds 5 --starts 3 &
fi
part tests 150 taskset -c "$OTHERS" "$PYTHON" -m pytest -m gpu tests/gpu -q -p no:cacheprovider &
part resume 150 taskset -c "$OTHERS" "$PYTHON" benchmarks/gpu_resume.py --data "$DATA" &
wait
show tests 60
show resume
[ -f "$LOGS/two_cores.log" ] && show two_cores
part cost 120 "$PYTHON" benchmarks/checkpoint_cost.py --data "$DATA" --sides 224 128 --rounds "${ROUNDS:-5}" --starts 3
show cost
part speed "${SPEED_SECONDS:-170}" "$PYTHON" benchmarks/engine_speed.py --timm-source "$TIMM" --sides 224 \
  --precisions bf16 --modes default tuned --systems bare ours timm --rounds 2 --data "$DATA" --steps 90
show speed
