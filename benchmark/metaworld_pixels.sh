#!/usr/bin/env bash
# MetaWorld from pictures, a policy for each of six tasks: pixels.sh says what is done, and what can be changed.
#
#     JOBS=2 bash benchmark/metaworld_pixels.sh       # from the shipped policy, checkpoints/tiny-metaworld
#     PRETRAIN=1 bash benchmark/metaworld_pixels.sh   # and that policy again, which is overwritten
export NAME=metaworld_pixels PREFIX=metaworld_ START=checkpoints/tiny-metaworld STEPS=${STEPS:-64000}
STAGE0="--env-id metaworld_button-press-topdown+coffee-button+hammer+coffee-push+hand-insert+stick-push"
STAGE0+=" --image-size 96 --patch-size 16 --num-envs 10 --num-scenes 18000 --scene-chunks 3 --vlm-steps 2200"
STAGE0+=" --max-error 0.1 --batch-size 64 --play-episodes 12 --play-steps 3000 --sloppiness 0.4"
RL="--num-envs 32 --num-steps 20 --denoise-steps 2 --update-epochs 4 --num-minibatches 4 --learning-rate 2e-4"
RL+=" --lr-warmup 4 --lr-schedule cosine --target-kl 0.1" CRITIC="--no-bootstrap --gae-lambda 0.95"
# task:steps of SFT, few enough that the policy is not good yet
TASKS=${TASKS:-"stick-push:40 coffee-push:30 button-press-topdown:6 coffee-button:2 hammer:200 hand-insert:500"}
export NOISE=${NOISE-$(sed 's/:[0-9]*//g' <<< "$TASKS")}  # Flow-Noise's tasks, all of them
export STAGE0 RL CRITIC TASKS
exec bash "$(dirname "${BASH_SOURCE[0]}")/pixels.sh" "$@"
