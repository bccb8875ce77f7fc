#!/usr/bin/env bash
# The results table of README.md and the picture docs/benchmark.png. Trains seeds 1, 2 and 3, evaluates the SFT
# policy and the three checkpoints on the fixed states, by the ODE and by the SDE, and calls benchmark/table.py.
#
#     bash benchmark/tabletop.sh             # one seed after another
#     JOBS=2 bash benchmark/tabletop.sh      # two at a time, on two idle cores; progress in $RUNS/seed*.log
#
# A seed with a finished run in $RUNS is not trained again, so an interrupted benchmark can be called again.
# Arguments go to flow_sde_ppo.py. Environment: PYTHON, JOBS, SEEDS, SFT, RUNS, OUTPUT.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON=${PYTHON:-.venv/bin/python} JOBS=${JOBS:-1} RUNS=${RUNS:-runs/benchmark}
export SFT=${SFT:-checkpoints/tabletop-sft}
SEEDS=${SEEDS:-1 2 3} OUTPUT=${OUTPUT:-docs/benchmark.png}
command -v "$PYTHON" >/dev/null || { echo "error: no $PYTHON; run 'make .venv' first, or set PYTHON" >&2; exit 2; }
mkdir -p "$RUNS"

finished() {  # the newest finished run of a seed; the curve is the last thing that a run writes
    local run newest=
    for run in "$RUNS"/tabletop__flow_sde_ppo__"$1"__*; do
        if [[ -f $run/learning_curve.png && -f $run/checkpoint/model.safetensors ]]; then newest=$run; fi
    done
    echo "$newest"
}

train() {
    local seed=$1 log=$RUNS/seed$1.log
    local command=("$PYTHON" flow_sde_ppo.py --checkpoint "$SFT" --run-dir "$RUNS" "${@:2}" --seed "$seed")
    if [[ -n $(finished "$seed") ]]; then
        echo "seed $seed: already trained, $(finished "$seed")"
    elif [[ $JOBS == 1 ]]; then
        "${command[@]}"
    else
        echo "seed $seed: training, progress in $log"
        "${command[@]}" >"$log" 2>&1 || { echo "error: seed $seed failed, see $log" >&2; return 1; }
        tail -n 1 "$log"
    fi
}

export -f finished train
# shellcheck disable=SC2086
printf '%s\n' $SEEDS | xargs -P "$JOBS" -I{} bash -c 'train "$@"' train {} "$@"

checkpoints=("$SFT") labels=(SFT)
for seed in $SEEDS; do
    checkpoints+=("$(finished "$seed")/checkpoint") labels+=("RL seed $seed")
done
"$PYTHON" evaluate.py --checkpoints "${checkpoints[@]}" --labels "${labels[@]}" \
    --stochastic --json "$RUNS/evaluation.json"
"$PYTHON" benchmark/table.py "$RUNS/evaluation.json" --output "$OUTPUT"
