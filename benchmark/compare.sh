#!/usr/bin/env bash
# The results table and the picture docs/compare.png: three algorithms x seeds 1, 2, 3 from one SFT policy,
# for the same number of environment steps. Then all are evaluated on the fixed states, by the ODE and with the
# noise that they explored with, and benchmark/plot.py makes table and picture.
#
#     bash benchmark/compare.sh             # one run after another, 90 minutes
#     JOBS=2 bash benchmark/compare.sh      # two at a time, on two idle cores; progress in $RUNS/*.log
#
# What has a finished run in $RUNS is not trained again, so an interrupted comparison can be called again.
# Arguments go to all training scripts. Environment: PYTHON, JOBS, SEEDS, SFT, RUNS, OUTPUT.
set -euo pipefail
if [[ " $* " == *" --help "* ]]; then sed -n '2,/^set/{s/^# \?//p}' "${BASH_SOURCE[0]}"; exit; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON=${PYTHON:-.venv/bin/python} JOBS=${JOBS:-1} RUNS=${RUNS:-runs/compare}
export SFT=${SFT:-checkpoints/tabletop-sft}
SEEDS=${SEEDS:-1 2 3} OUTPUT=${OUTPUT:-docs/compare.png} SCRIPTS="flow_noise_ppo flow_sde_ppo flow_sde_grpo"
if ! command -v "$PYTHON" >/dev/null; then
    echo "error: no $PYTHON; run 'make install' first, or set PYTHON" >&2
    exit 2
fi
mkdir -p "$RUNS"

finished() {  # the newest finished run of a script and seed; the curve is the last thing that a run writes
    local run newest=
    for run in "$RUNS"/tabletop__"$1"__"$2"__*; do
        if [[ -f $run/learning_curve.png && -f $run/checkpoint/model.safetensors ]]; then newest=$run; fi
    done
    echo "$newest"
}

train() {
    local script=$1 seed=$2 log=$RUNS/$1-$2.log
    local command=("$PYTHON" "$script.py" --seed "$seed" --checkpoint "$SFT" --run-dir "$RUNS")
    command+=(--total-timesteps 900000 --eval-freq 20 "${@:3}")
    if [[ -n $(finished "$script" "$seed") ]]; then
        echo "$script, seed $seed: already trained, $(finished "$script" "$seed")"
    elif [[ $JOBS == 1 ]]; then
        "${command[@]}"
    else
        echo "$script, seed $seed: training, progress in $log"
        "${command[@]}" >"$log" 2>&1 || { echo "error: $script, seed $seed failed, see $log" >&2; return 1; }
        tail -n 1 "$log"
    fi
}

export -f finished train
# shellcheck disable=SC2086
for seed in $SEEDS; do printf "%s $seed\n" $SCRIPTS; done |
    xargs -P "$JOBS" -L 1 bash -c 'train "${@: -2}" "${@:1:$#-2}"' train "$@"

for script in $SCRIPTS; do
    checkpoints=("$SFT") labels=(SFT) noise=()
    if [[ $script == flow_noise_ppo ]]; then
        checkpoints=() labels=() noise=(--noise learned --mdp two-layer)
    fi
    for seed in $SEEDS; do
        checkpoints+=("$(finished "$script" "$seed")/checkpoint") labels+=("$script, seed $seed")
    done
    "$PYTHON" evaluate.py --checkpoints "${checkpoints[@]}" --labels "${labels[@]}" --stochastic \
        "${noise[@]}" --json "$RUNS/$script.json"
done
"$PYTHON" benchmark/plot.py "$RUNS" --output "$OUTPUT"
