#!/usr/bin/env bash
# HalfCheetah-v4, 2:4, 150 000 steps, K in {1, 100, 1000, 10000, 0}, 3 seeds each: two runs of one thread at a time.
# From the root of the project; then: python sad_analysis.py runs --out results/sad_study --points 50
set -euo pipefail
for seed in 1 2 3; do
  for k in 1 0 1000 100 10000; do
    echo --env-id HalfCheetah-v4 --n 2 --m 4 --init linear --dense-layers none --total-timesteps 150000 --seed $seed --mask-update-interval $k
  done
done | OMP_NUM_THREADS=1 xargs -P 2 -L 1 "${PYTHON:-python}" "$(dirname "$0")/../../rnm_td3_continuous.py"
