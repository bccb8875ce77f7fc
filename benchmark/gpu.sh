#!/usr/bin/env bash
# What a GPU shows within minutes, on pi0 and pi0.5 of full size with random weights: milliseconds a chunk at
# batches of 1 and 64, the share of the card's peak in `encode`, chunks per second and peak memory of an update at
# micro-batches of 8 to 32, and what the savings of benchmark/schedules.py are worth there.
#
#     bash benchmark/gpu.sh                         # prints Markdown
#     SIZE=tiny DEVICE=cpu bash benchmark/gpu.sh    # to try the script, on tiny policies
#
# Needs this repository, torch, transformers, safetensors and tyro; no simulator, no checkpoint, no gymnasium. Where
# all of requirements-core.txt is there, one iteration runs through flow_sde_ppo.py's own `main`, too.
# Arguments go to schedules.py, like --rounds 1. Environment: PYTHON, SIZE (full, scaled or tiny), DEVICE.
set -euo pipefail
if [[ " $* " == *" --help "* ]]; then sed -n '2,/^set/{s/^# \?//p}' "${BASH_SOURCE[0]}"; exit; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python} SIZE=${SIZE:-full} DEVICE=${DEVICE:-cuda}

for model in pi0 pi05; do
    "$PYTHON" benchmark/schedules.py --report speed --model "$model" --size "$SIZE" --device "$DEVICE" "$@"
done
"$PYTHON" benchmark/schedules.py --size "$SIZE" --device "$DEVICE" \
    --num-envs 64 --num-steps 1 --micro-batch-size 32 "$@"
if [[ $SIZE != scaled ]] && "$PYTHON" -c "import gymnasium, matplotlib, tensorboard" 2>/dev/null; then
    "$PYTHON" benchmark/full_size.py --size "$SIZE" --device "$DEVICE"
fi
