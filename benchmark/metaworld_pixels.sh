#!/usr/bin/env bash
# MetaWorld from pictures of 64 x 64 pixels: one pre-trained policy, SFT on ten demonstrations of a task, RL,
# 50 episodes of every policy; then the table, docs/metaworld_pixels.png and .gif.
#
#     bash benchmark/metaworld_pixels.sh              # seed 1 of every task, from the shipped policy
#     PRETRAIN=1 bash benchmark/metaworld_pixels.sh   # and that policy again, which is overwritten
#
# Done work is skipped, so it can be stopped and started again. Seconds of every step: $OUT/seconds.txt.
# Environment: PYTHON, JOBS, OUT, STEPS (of a run), SEEDS, TASKS (name:steps of SFT), NOISE (Flow-Noise's tasks).
set -euo pipefail
if [[ " $* " == *" --help "* ]]; then sed -n '2,/^set/{s/^# \?//p}' "${BASH_SOURCE[0]}"; exit; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-runs/metaworld_pixels} JOBS=${JOBS:-1} STEPS=${STEPS:-64000}
TASKS=${TASKS:-"button-press-topdown:10"} SEEDS=${SEEDS:-1} NOISE=${NOISE:-}
START=checkpoints/tiny-metaworld
export PYTHON OUT STEPS START

timed() {  # what, and its command
  local began=$SECONDS
  "${@:2}" > "$OUT/$1.log" 2>&1
  echo "$1 $((SECONDS - began))" >> "$OUT/seconds.txt"
}
pretrain() {
  [ -f "$OUT/pretrain.log" ] && return
  timed pretrain "$PYTHON" flow_sft.py --pretrain --env-id metaworld_button-press-topdown --obs-mode fast --image-size 64 \
    --patch-size 16 --num-envs 16 --num-scenes 2400 --scene-chunks 12 --vlm-steps 400 --batch-size 64 --play-episodes 25 \
    --play-steps 300 --sloppiness 0.8 --output "$START"
}
sft() {  # task:steps
  local task=${1%:*} out=$OUT/sft/${1%:*}
  [ -f "$out/model.safetensors" ] && return
  timed "sft-$task" "$PYTHON" flow_sft.py --env-id "metaworld_$task" --obs-mode fast --checkpoint "$START" \
    --num-envs 8 --num-demos 10 --total-steps "${1#*:}" --learning-rate 3e-4 --output "$out"
}
train() {  # script task seed
  local out=$OUT/$1/$2-$3
  ls "$out"/*/learning_curve.png > /dev/null 2>&1 && return
  timed "$1-$2-$3" "$PYTHON" "$1.py" --env-id "metaworld_$2" --model tiny --obs-mode fast \
    --checkpoint "$OUT/sft/$2" --seed "$3" --num-envs 32 --num-steps 20 --denoise-steps 2 --update-epochs 2 \
    --num-minibatches 2 --learning-rate 3e-4 --lr-schedule cosine --target-kl 0.1 --save-freq 5 \
    --total-timesteps "$STEPS" --eval-freq -1 --run-dir "$out" --resume auto
}
evaluate() {  # task
  [ -f "$OUT/$1.json" ] && return
  local policies=("$OUT/sft/$1")
  for policy in "$OUT"/flow_*/"$1"-?/*/checkpoint; do [ -d "$policy" ] && policies+=("$policy"); done
  timed "evaluate-$1" "$PYTHON" evaluate.py --env-id "metaworld_$1" --obs-mode fast --num-envs 10 \
    --denoise-steps 2 --json "$OUT/$1.json" --capture-video "$OUT/$1.gif" --checkpoints "${policies[@]}"
}
export -f timed sft train evaluate
mkdir -p "$OUT/flow_sde_ppo" "$OUT/flow_noise_ppo"

[ -z "${PRETRAIN:-}" ] || pretrain
names=$(for task in $TASKS; do echo "${task%:*}"; done)
for task in $TASKS; do echo "sft $task"; done | xargs -P "$JOBS" -I{} bash -c '{}'
{
  for seed in $SEEDS; do for task in $names; do echo "train flow_sde_ppo $task $seed"; done; done
  for seed in $SEEDS; do for task in $NOISE; do echo "train flow_noise_ppo $task $seed"; done; done
} | xargs -P "$JOBS" -I{} bash -c '{}'
for task in $names; do echo "evaluate $task"; done | xargs -P "$JOBS" -I{} bash -c '{}'
$PYTHON benchmark/metaworld_table.py "$OUT" --output docs/metaworld_pixels.png
cp "$OUT/${names%%$'\n'*}.gif" docs/metaworld_pixels.gif  # of the first task
cat "$OUT/seconds.txt"
