#!/usr/bin/env bash
# MetaWorld from pictures, a policy for each task: benchmark/pixels.sh says what is done, and what can be changed.
#
#     JOBS=2 bash benchmark/metaworld_pixels.sh       # from the shipped policy, checkpoints/tiny-metaworld
#     PRETRAIN=1 bash benchmark/metaworld_pixels.sh   # and that policy again, which is overwritten
export NAME=metaworld_pixels PREFIX=metaworld_ START=checkpoints/tiny-metaworld STEPS=${STEPS:-64000}
export STAGE0="--env-id metaworld_button-press-topdown+coffee-button+hammer+coffee-push+push+stick-push --image-size 96"
export RL="--num-envs 32 --num-steps 20 --denoise-steps 2 --update-epochs 2 --num-minibatches 2 --learning-rate 3e-4"
RL+=" --lr-schedule cosine --target-kl 0.1"
export TASKS=${TASKS:-"button-press-topdown:10"}
exec bash "$(dirname "${BASH_SOURCE[0]}")/pixels.sh" "$@"
