#!/usr/bin/env bash
# MetaWorld from the state: SFT on ten demonstrations of a task, RL, 100 episodes of every policy; then the
# table and docs/metaworld.png by benchmark/metaworld_table.py. Hours on two cores with the tasks below.
#
#     JOBS=2 bash benchmark/metaworld.sh    # so many trainings at once
#
# Done work is skipped, so it can be stopped and started again.
# Environment: PYTHON, JOBS, OUT, STEPS (of a run), TASKS (name:steps of SFT), NOISE (Flow-Noise's tasks).
set -euo pipefail
if [[ " $* " == *" --help "* ]]; then sed -n '2,/^set/{s/^# \?//p}' "${BASH_SOURCE[0]}"; exit; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-runs/metaworld} JOBS=${JOBS:-2} STEPS=${STEPS:-120000}
# task:steps of SFT, few enough that the policy is not good yet
TASKS=${TASKS:-"lever-pull:60 peg-unplug-side:60 coffee-push:40 sweep-into:40 push:60 hand-insert:60
  stick-push:20 pick-place-wall:120"}
NOISE=${NOISE:-"coffee-push sweep-into push"}
export PYTHON OUT STEPS

sft() {  # task:steps
  local task=${1%:*} out=$OUT/sft/${1%:*}
  [ -f "$out/model.safetensors" ] && return
  $PYTHON flow_sft.py --env-id "metaworld_$task" --obs-mode state --num-envs 8 --num-demos 10 \
    --total-steps "${1#*:}" --learning-rate 1e-3 --output "$out" > "$OUT/sft-$task.log" 2>&1
}
train() {  # script task seed
  local out=$OUT/$1/$2-$3 steps=$STEPS bounds=()
  [ "$2" = mt10 ] && steps=$((2 * STEPS))
  # as much exploration as Flow-SDE's at K = 2
  [ "$1" = flow_noise_ppo ] && bounds=(--noise-std-min 0.35 --noise-std-max 0.95)
  ls "$out"/*/learning_curve.png > /dev/null 2>&1 && return
  rm -rf "$out"
  $PYTHON "$1.py" --env-id "metaworld_$2" --model tiny --obs-mode state --checkpoint "$OUT/sft/$2" \
    --seed "$3" --num-envs 64 --num-steps 20 --denoise-steps 2 --update-epochs 2 --num-minibatches 4 --learning-rate 2e-4 \
    --lr-warmup 4 --lr-schedule cosine --target-kl 0.1 --total-timesteps "$steps" --eval-freq -1 \
    --run-dir "$out" "${bounds[@]}" > "$out.log" 2>&1
}
evaluate() {  # task
  [ -f "$OUT/$1.json" ] && return
  local seeds="0 1"
  [ "$1" = mt10 ] && seeds=0  # of ten tasks
  local policies=("$OUT/sft/$1" "$OUT"/flow_*/"$1"-?/*/checkpoint)
  # shellcheck disable=SC2086
  $PYTHON evaluate.py --env-id "metaworld_$1" --obs-mode state --num-envs 50 --denoise-steps 2 \
    --seeds $seeds --json "$OUT/$1.json" --checkpoints "${policies[@]}" > "$OUT/$1.txt" 2>&1
}
export -f sft train evaluate
mkdir -p "$OUT"/flow_sde_ppo "$OUT"/flow_noise_ppo

names=$(for task in $TASKS; do echo "${task%:*}"; done)
for task in $TASKS mt10:200; do echo "sft $task"; done | xargs -P "$JOBS" -I{} bash -c '{}'
for seed in 1 2 3; do
  for task in $NOISE; do echo "train flow_noise_ppo $task $seed"; done
  for task in $names mt10; do echo "train flow_sde_ppo $task $seed"; done
done | xargs -P "$JOBS" -I{} bash -c '{}'
for task in $names mt10; do echo "evaluate $task"; done | xargs -P "$JOBS" -I{} bash -c '{}'
$PYTHON benchmark/metaworld_table.py "$OUT"
