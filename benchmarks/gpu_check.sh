#!/usr/bin/env bash
# All that needs a GPU, in one call of some minutes; what fails is said, and the rest goes on.
#
#   benchmarks/gpu_check.sh DATA TIMM
#
# DATA: a prepared data set. TIMM: a folder with timm's train.py (a checkout). PARTS: which, if not all.
# What is timed on two cores runs beside the rest, on cores of its own.
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
WANTED=" ${PARTS:-tests resume cost speed starts two_cores} "
wants() { [[ "$WANTED" == *" $1 "* ]]; }

if wants two_cores; then
  CUDA_VISIBLE_DEVICES="" part two_cores 240 taskset -c "$OWN" "$PYTHON" benchmarks/checkpoint_cost.py \
    --data "$DATA" --ranks 2 --rounds "${ROUNDS:-5}" --starts 3 &
fi
if wants tests; then
  part tests 150 taskset -c "$OTHERS" "$PYTHON" -m pytest -m gpu tests/gpu -q -p no:cacheprovider
  show tests 60
fi
if wants resume; then
  part resume 150 taskset -c "$OTHERS" "$PYTHON" benchmarks/gpu_resume.py --data "$DATA" --precisions bf16
  show resume
fi
if wants cost; then
  part cost 150 taskset -c "$OTHERS" "$PYTHON" benchmarks/checkpoint_cost.py --data "$DATA" \
    --rounds "${ROUNDS:-5}" --starts 0
  show cost
fi
if wants speed; then
  part speed 170 taskset -c "$OTHERS" "$PYTHON" benchmarks/engine_speed.py --timm-source "$TIMM" --sides 224 \
    --precisions bf16 --modes ${MODES:-default tuned} --systems ours bare timm --rounds 1 --num-images 2000
  show speed
fi
if wants starts; then
  part starts 150 "$PYTHON" benchmarks/checkpoint_cost.py --data "$DATA" --rounds 0 --starts "${STARTS:-3}"
  show starts
fi
wait
if wants two_cores; then show two_cores; fi
