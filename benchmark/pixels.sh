#!/usr/bin/env bash
# What metaworld_pixels.sh, mt10_pixels.sh and libero_pixels.sh do: SFT on ten demonstrations of a task, RL from
# there, 50 fixed episodes of every policy by the ODE; then the table, docs/NAME.png and, of the first task, its GIF.
#
# Done work is skipped, so it can be stopped and started again; with other flags begin in another OUT. Seconds of every
# step: $OUT/seconds.txt.
# Environment: NAME, PREFIX (of the ids), START (the pre-trained policy) and STAGE0 (flags that made it), RL (flags of
# the three algorithms), SDE (more, of the two of Flow-SDE), CRITIC (more, of the two that have one), TASKS (name:steps
# of SFT), STEPS (of a run), and for the user SEEDS, NOISE and GRPO (these scripts' tasks), EVAL_ENVS (simulators of an
# evaluation), PRETRAIN (not empty: stage 0 again, overwrites START), PYTHON, JOBS (trainings at once), OUT.
set -euo pipefail
if [[ " $* " == *" --help "* ]]; then sed -n '2,/^set/{s/^# \?//p}' "${BASH_SOURCE[0]}"; exit; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
export PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-runs/$NAME} JOBS=${JOBS:-1} SEEDS=${SEEDS:-1 2 3}
export PREFIX START RL SDE CRITIC STEPS EVAL_ENVS=${EVAL_ENVS:-10}

timed() {  # what, and its command
  local began=$SECONDS
  "${@:2}" > "$OUT/$1.log" 2>&1
  echo "$1 $((SECONDS - began))" >> "$OUT/seconds.txt"
}
pretrain() {
  [ -f "$OUT/pretrain.log" ] && return
  timed pretrain "$PYTHON" flow_sft.py --pretrain --obs-mode fast $STAGE0 --output "$START"
}
sft() {  # task:steps
  local task=${1%:*} out=$OUT/sft/${1%:*}
  [ -f "$out/model.safetensors" ] && return
  timed "sft-$task" "$PYTHON" flow_sft.py --env-id "$PREFIX$task" --obs-mode fast --checkpoint "$START" \
    --num-envs 8 --num-demos 10 --total-steps "${1#*:}" --learning-rate 3e-4 --output "$out"
}
train() {  # script task seed
  local out=$OUT/$1/$2-$3 sde=$SDE critic=$CRITIC
  [ "$1" = flow_noise_ppo ] && sde=
  [ "$1" = flow_sde_grpo ] && critic=
  ls "$out"/*/learning_curve.png > /dev/null 2>&1 && return
  timed "$1-$2-$3" "$PYTHON" "$1.py" --env-id "$PREFIX$2" --model tiny --obs-mode fast --checkpoint "$OUT/sft/$2" \
    --seed "$3" $RL $sde $critic --total-timesteps "$STEPS" --save-freq 5 --eval-freq -1 --run-dir "$out" --resume auto
}
evaluate() {  # task
  [ -f "$OUT/$1.json" ] && [ -z "$(find "$OUT"/flow_*/"$1"-? -name learning_curve.png -newer "$OUT/$1.json")" ] && return
  local policies=("$OUT/sft/$1")
  for policy in "$OUT"/flow_*/"$1"-?/*/checkpoint; do [ -d "$policy" ] && policies+=("$policy"); done
  timed "evaluate-$1" "$PYTHON" evaluate.py --env-id "$PREFIX$1" --obs-mode fast --num-envs "$EVAL_ENVS" --denoise-steps 2 \
    --json "$OUT/$1.json" --checkpoints "${policies[@]}"
}
film() {  # task: before and after
  timed film "$PYTHON" evaluate.py --env-id "$PREFIX$1" --obs-mode fast --num-envs "$EVAL_ENVS" --denoise-steps 2 --labels "after SFT" \
    "after RL" --checkpoints "$OUT/sft/$1" "$OUT/flow_sde_ppo/$1-${SEEDS%% *}"/*/checkpoint --capture-video "docs/$NAME.gif"
}
export -f timed sft train evaluate
mkdir -p "$OUT/flow_sde_ppo" "$OUT/flow_noise_ppo" "$OUT/flow_sde_grpo"

[ -z "${PRETRAIN:-}" ] || pretrain
names=$(for task in $TASKS; do echo "${task%:*}"; done)
for task in $TASKS; do echo "sft $task"; done | xargs -P "$JOBS" -I{} bash -ec '{}'
for seed in $SEEDS; do
  for task in $names; do echo "train flow_sde_ppo $task $seed"; done
  for task in ${NOISE:-}; do echo "train flow_noise_ppo $task $seed"; done
  for task in ${GRPO:-}; do echo "train flow_sde_grpo $task $seed"; done
done | xargs -P "$JOBS" -I{} bash -ec '{}'
for task in $names; do echo "evaluate $task"; done | xargs -P "$JOBS" -I{} bash -ec '{}'
$PYTHON benchmark/rl_table.py "$OUT" --output "docs/$NAME.png"
film "${names%%$'\n'*}"
cat "$OUT/seconds.txt"
