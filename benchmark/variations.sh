#!/usr/bin/env bash
# Generalisation: SFT and every policy of benchmark/compare.sh on the tabletop and on its nine variations, then
# the table in docs/results/generalisation.md by benchmark/variations_table.py.
#
#     bash benchmark/variations.sh           # after compare.sh; about a minute of CPU time a policy
#     JOBS=2 bash benchmark/variations.sh    # two at a time, on two idle cores
#
# A policy that has a report in $OUT is not evaluated again, so an interrupted call can be made again.
# Arguments go to evaluate.py. Environment: PYTHON, JOBS, SFT, RUNS, OUT, PAGE.
set -euo pipefail
if [[ " $* " == *" --help "* ]]; then sed -n '2,/^set/{s/^# \?//p}' "${BASH_SOURCE[0]}"; exit; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 PYTHON=${PYTHON:-.venv/bin/python} RUNS=${RUNS:-runs/compare}
JOBS=${JOBS:-1} SFT=${SFT:-checkpoints/tabletop-sft} PAGE=${PAGE:-docs/results/generalisation.md}
export OUT=${OUT:-$RUNS/variations}
if ! command -v "$PYTHON" >/dev/null; then
    echo "error: no $PYTHON; run 'make install' first, or set PYTHON" >&2
    exit 2
fi

evaluate() {  # folder of a policy, name of its report
    if [[ -f $OUT/$2.json ]]; then echo "$2: already evaluated"; return; fi
    echo "$2: evaluating, progress in $OUT/$2.log"
    "$PYTHON" evaluate.py --variations --checkpoints "$1" --labels "$2" --json "$OUT/$2.json" "${@:3}" \
        >"$OUT/$2.log" 2>&1 || { echo "error: $2 failed, see $OUT/$2.log" >&2; return 1; }
}

export -f evaluate
policies=("$SFT SFT")
for run in "$RUNS"/tabletop__*; do
    # the curve is the last thing that a run writes
    if [[ -f $run/learning_curve.png && -f $run/checkpoint/model.safetensors ]]; then
        policies+=("$run/checkpoint $(basename "$run")")
    fi
done
if [[ ${#policies[@]} == 1 ]]; then
    echo "error: $RUNS has no finished run: bash benchmark/compare.sh makes them" >&2
    exit 2
fi
mkdir -p "$OUT"
printf '%s\n' "${policies[@]}" | xargs -P "$JOBS" -L 1 bash -c 'evaluate "${@: -2}" "${@:1:$#-2}"' evaluate "$@"
"$PYTHON" benchmark/variations_table.py "$OUT" --page "$PAGE"
