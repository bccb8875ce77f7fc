#!/usr/bin/env bash
# MetaWorld's MT10 from pictures, one policy for its ten tasks: pixels.sh says what is done, and what can be changed.
# Every environment holds ten models of 60 MB: 16 of them are 10 GB, so one training at a time.
#
#     bash benchmark/mt10_pixels.sh              # from the shipped policy, checkpoints/tiny-mt10
#     PRETRAIN=1 bash benchmark/mt10_pixels.sh   # and that policy again, which is overwritten
export NAME=mt10_pixels PREFIX=metaworld_ START=checkpoints/tiny-mt10 STEPS=${STEPS:-200000}
STAGE0="--env-id metaworld_mt10 --image-size 96 --patch-size 16 --num-envs 6 --num-scenes 30000 --scene-chunks 3"
STAGE0+=" --vlm-steps 4000 --max-error 1 --batch-size 64 --play-episodes 20 --play-steps 4000 --sloppiness 0.4"
RL="--num-envs 16 --num-steps 80 --denoise-steps 2 --update-epochs 4 --num-minibatches 4 --learning-rate 2e-4"
RL+=" --lr-warmup 4 --lr-schedule cosine --target-kl 0.1" CRITIC="--no-bootstrap --gae-lambda 0.95"
TASKS=${TASKS:-"mt10:100"}
export STAGE0 RL CRITIC TASKS EVAL_ENVS=8
exec bash "$(dirname "${BASH_SOURCE[0]}")/pixels.sh" "$@"
