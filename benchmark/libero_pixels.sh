#!/usr/bin/env bash
# LIBERO-Goal from pictures, original assets (make libero-assets), a policy for each of four tasks, two seeds:
# pixels.sh says what is done, and what can be changed. Each of JOBS takes 7 GB, for sixteen simulators.
# With the bootstrap RL rose and then unlearned (docs/log.md).
#
#     JOBS=2 bash benchmark/libero_pixels.sh       # from the shipped policy, checkpoints/tiny-libero
#     PRETRAIN=1 bash benchmark/libero_pixels.sh   # and that policy again, which is overwritten
export NAME=libero_pixels PREFIX=libero_goal_ START=checkpoints/tiny-libero STEPS=${STEPS:-60000} SEEDS=${SEEDS:-1 2}
STAGE0="--env-id libero_goal_experts --image-size 64 --patch-size 16 --num-envs 8 --num-scenes 4000 --scene-chunks 8"
STAGE0+=" --vlm-steps 1000 --batch-size 64 --play-episodes 50 --play-stride 5 --play-steps 5000 --sloppiness 0.15"
STAGE0+=" --corrections"
RL="--num-envs 16 --num-steps 64 --max-episode-steps 160 --denoise-steps 2"
RL+=" --update-epochs 4 --num-minibatches 4 --learning-rate 1e-4 --lr-warmup 3 --lr-schedule cosine --target-kl 0.1"
SDE="--noisy-last-step --noise-level 0.25" CRITIC="--no-bootstrap --gamma 0.99 --gae-lambda 0.99"
# task:steps of SFT, that leave something to learn: from pictures ten clean demonstrations take some away (docs/log.md)
TASKS=${TASKS:-"put_the_bowl_on_the_plate:15 put_the_bowl_on_the_stove:1 put_the_cream_cheese_in_the_bowl:1
  put_the_bowl_on_top_of_the_cabinet:15"}
export STAGE0 RL SDE CRITIC TASKS EVAL_ENVS=8
exec bash "$(dirname "${BASH_SOURCE[0]}")/pixels.sh" "$@"
