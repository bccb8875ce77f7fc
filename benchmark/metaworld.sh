#!/usr/bin/env bash
# MetaWorld from the state: SFT on ten demonstrations of a task, RL by Flow-SDE and Flow-Noise with as much
# exploration and as many steps, three seeds, 50 episodes of every policy; then the table and docs/metaworld.png
# by benchmark/rl_table.py. Three minutes of one core for each training.
#
#     JOBS=2 bash benchmark/metaworld.sh    # so many trainings at once
#
# Done work is skipped, so it can be stopped and started again.
# Environment: PYTHON, JOBS, OUT, STEPS (of a run), SEEDS, TASKS (name:steps of SFT; mt10 is ten tasks in one
# policy, with twice the steps), NOISE (Flow-Noise's tasks), PICTURE.
set -euo pipefail
if [[ " $* " == *" --help "* ]]; then sed -n '2,/^set/{s/^# \?//p}' "${BASH_SOURCE[0]}"; exit; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-runs/metaworld} JOBS=${JOBS:-2} STEPS=${STEPS:-120000}
# task:steps of SFT, few enough that the policy is not good yet
TASKS=${TASKS:-"push:100 coffee-push:40 lever-pull:60"}
NOISE=${NOISE:-"push coffee-push lever-pull"} SEEDS=${SEEDS:-1 2 3} PICTURE=${PICTURE:-docs/metaworld.png}
export PYTHON OUT STEPS

sft() {  # task:steps
  local task=${1%:*} out=$OUT/sft/${1%:*}
  [ -f "$out/model.safetensors" ] && return
  $PYTHON flow_sft.py --env-id "metaworld_$task" --obs-mode state --num-envs 8 --num-demos 10 \
    --total-steps "${1#*:}" --learning-rate 1e-3 --output "$out" > "$OUT/sft-$task.log" 2>&1
}
train() {  # script task seed
  local out=$OUT/$1/$2-$3 steps=$STEPS noise=(--noise-level 1.0)
  [ "$2" = mt10 ] && steps=$((2 * STEPS))
  # at K = 2 these bounds explore as widely as Flow-SDE does at this level: flow/exploration 0.5
  [ "$1" = flow_noise_ppo ] && noise=(--noise-std-min 0.3 --noise-std-max 0.75 --ent-coef 0.03)
  ls "$out"/*/learning_curve.png > /dev/null 2>&1 && return
  rm -rf "$out"
  $PYTHON "$1.py" --env-id "metaworld_$2" --model tiny --obs-mode state --checkpoint "$OUT/sft/$2" \
    --seed "$3" --num-envs 64 --num-steps 20 --denoise-steps 2 --update-epochs 4 --num-minibatches 4 --learning-rate 2e-4 \
    --lr-warmup 4 --lr-schedule cosine --target-kl 0.1 --total-timesteps "$steps" --eval-freq -1 \
    --run-dir "$out" "${noise[@]}" > "$out.log" 2>&1
}
evaluate() {  # task
  [ -f "$OUT/$1.json" ] && return
  local policies=("$OUT/sft/$1" "$OUT"/flow_*/"$1"-?/*/checkpoint)
  $PYTHON evaluate.py --env-id "metaworld_$1" --obs-mode state --num-envs 50 --denoise-steps 2 \
    --json "$OUT/$1.json" --checkpoints "${policies[@]}" > "$OUT/$1.txt" 2>&1
}
export -f sft train evaluate
mkdir -p "$OUT"/flow_sde_ppo "$OUT"/flow_noise_ppo

names=$(for task in $TASKS; do echo "${task%:*}"; done)
for task in $TASKS; do echo "sft $task"; done | xargs -P "$JOBS" -I{} bash -ec '{}'
for seed in $SEEDS; do
  for task in $names; do echo "train flow_sde_ppo $task $seed"; done
  for task in $NOISE; do echo "train flow_noise_ppo $task $seed"; done
done | xargs -P "$JOBS" -I{} bash -ec '{}'
for task in $names; do echo "evaluate $task"; done | xargs -P "$JOBS" -I{} bash -ec '{}'
$PYTHON benchmark/rl_table.py "$OUT" --output "$PICTURE"
