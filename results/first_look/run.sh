#!/usr/bin/env bash
# Two runs at a time, one thread each. The malloc settings only save time (fewer page faults); they change no result.
set -euo pipefail
export OMP_NUM_THREADS=1 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000
common="--env-id HalfCheetah-v4 --total-timesteps 100000 --save-model"
{
  for seed in 1 2; do
    echo "rnm_td3_continuous.py $common --backend masked --seed $seed --n 2 --m 4 --exp-name rnm_td3_2_4"
    echo "td3_continuous.py $common --seed $seed"
    echo "rnm_td3_continuous.py $common --backend masked --seed $seed --n 1 --m 4 --exp-name rnm_td3_1_4"
    echo "rnm_td3_continuous.py $common --backend masked --seed $seed --n 1 --m 8 --exp-name rnm_td3_1_8"
  done
} | xargs -P 2 -I{} sh -c 'python {}'
