#!/usr/bin/env bash
# LIBERO-Goal from pictures, original assets, a policy for each of three tasks: pixels.sh says what is done, and what
# can be changed. The policy that SFT starts from is not shipped, so stage 0 is a part of it.
#
#     PRETRAIN=1 JOBS=2 bash benchmark/libero_pixels.sh
export NAME=libero_pixels PREFIX=libero_goal_ START=${START:-runs/libero_pixels/start} STEPS=${STEPS:-80000}
