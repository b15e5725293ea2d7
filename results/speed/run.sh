#!/usr/bin/env bash
# Measures steps per second; results go to the folder $CPU, a name for this machine, such as zen4. Needs a checkout of
# CleanRL in $CLEANRL and, for each rival, the Python of an environment that it runs in; nothing else should run on the
# machine. About an hour on two cores; one part alone: its name as the argument. `gpu`, on a machine that has one, is
# not part of all, and needs LeanRL's td3_continuous_action_torchcompile.py in $LEANRL.
set -euo pipefail
cd "$(dirname "$0")/../.."
ours=${PYTHON:-python} here=$PWD results=$PWD/results/speed/${CPU:?} measure=$PWD/results/speed/steps_per_second.py
mkdir -p "$results"

task() { echo "--env-id $1 --total-timesteps $2 --learning-starts 1000"; }
cleanrl() { echo "CleanRL=env PYTHONPATH=$CLEANRL $CLEANRL_PYTHON $CLEANRL/cleanrl/td3_continuous_action.py $(task "$@")"; }
cleanrl_jax() {
  echo "CleanRL JAX=env PYTHONPATH=$CLEANRL JAX_PLATFORMS=cpu $CLEANRL_JAX_PYTHON" \
    "$CLEANRL/cleanrl/td3_continuous_action_jax.py $(task "$@")"
}
sb3() { echo "Stable-Baselines3=$SBX_PYTHON $measure --drive sb3 $*"; }
sbx() { echo "SBX=env JAX_PLATFORMS=cpu $SBX_PYTHON $measure --drive sbx $*"; }
dense() { # NAME ENV STEPS FLAGS
  local name=$1 env=$2 steps=$3
  shift 3
  echo "$name=$ours $here/td3_continuous.py $(task "$env" "$steps") --eval-interval 0 $*"
}
sparse() { # NAME N M ENV STEPS FLAGS
  local name=$1 n=$2 m=$3 env=$4 steps=$5
  shift 5
  echo "$name=$ours $here/rnm_td3_continuous.py $(task "$env" "$steps") --eval-interval 0 --n $n --m $m $*"
}

cheetah="HalfCheetah-v4 4500" ant="Ant-v4 4000"
if [[ ${1:-all} =~ all|rivals ]]; then
  $ours "$measure" --rounds 3 --threads 2 --out "$results/halfcheetah_2_threads" \
    "$(cleanrl $cheetah)" ${CLEANRL_JAX_PYTHON:+"$(cleanrl_jax $cheetah)"} "$(sb3 $cheetah)" "$(sbx $cheetah)" \
    "$(dense dense $cheetah)" "$(sparse 2:4 2 4 $cheetah)" "$(sparse 1:4 1 4 $cheetah)" "$(sparse 1:8 1 8 $cheetah)"
  $ours "$measure" --rounds 3 --threads 1 --out "$results/halfcheetah_1_thread" "$(cleanrl $cheetah)" \
    "$(dense dense $cheetah)" "$(sparse 2:4 2 4 $cheetah)" "$(sparse 1:4 1 4 $cheetah)" "$(sparse 1:8 1 8 $cheetah)"
fi
[[ ${1:-all} =~ all|ant ]] && $ours "$measure" --rounds 3 --threads 2 --out "$results/ant" "$(cleanrl $ant)" \
  "$(sbx $ant)" "$(dense dense $ant)" "$(sparse 2:4 2 4 $ant)" "$(sparse 1:4 1 4 $ant)" "$(sparse 1:8 1 8 $ant)"
[[ ${1:-all} =~ all|layers ]] && $ours "$measure" --rounds 5 --threads 2 --out "$results/dense_layers" \
  "$(sparse 'to the letter' 1 8 $cheetah --init linear --dense-layers none)" "$(sparse last 1 8 $cheetah)" \
  "$(sparse first,last 1 8 $cheetah --dense-layers first,last)"
[[ ${1:-all} =~ all|wide ]] && $ours "$measure" --rounds 3 --threads 2 --out "$results/wide" \
  "$(dense dense $cheetah)" "$(sparse 1:4 1 4 $cheetah)" "$(sparse '1:4, critics 1:2' 1 4 $cheetah --critic-m 2)" \
  "$(sparse 1:8 1 8 $cheetah)" "$(sparse '1:8, critics 1:4' 1 8 $cheetah --critic-m 4)" \
  "$(sparse '1:4, 512' 1 4 $cheetah --hidden-sizes 512 512)" "$(sparse '1:8, 512' 1 8 $cheetah --hidden-sizes 512 512)" \
  "$(sparse '1:16, 1024' 1 16 $cheetah --hidden-sizes 1024 1024)"
[[ ${1:-all} =~ all|intervals ]] && $ours "$measure" --rounds 3 --threads 2 --out "$results/mask_update_interval" \
  "$(sparse 'K 1000' 1 4 $cheetah --no-save-masks)" "$(sparse 'K 0' 1 4 $cheetah --mask-update-interval 0)" \
  "$(sparse 'K 1' 1 4 $cheetah --mask-update-interval 1 --no-save-masks)" \
  "$(sparse 'K 1, masks saved' 1 4 $cheetah --mask-update-interval 1)"
[[ ${1:-all} =~ all|overlap ]] && for task in "HalfCheetah-v4 4500" "Ant-v4 4000"; do for threads in 2 1; do
  $ours "$measure" --rounds 3 --threads $threads --out "$results/overlap_${task%%-*}_${threads}_threads" \
    "$(sparse off 1 4 $task)" "$(sparse on 1 4 $task --overlap)"
done; done
[[ ${1:-all} =~ all|sizes ]] && for size in 256 512 1024 2048; do
  steps=$((1200 + 300000 / size / 100 * 100))
  $ours "$measure" --rounds 3 --threads 2 --first 1009 --out "$results/hidden_$size" \
    "$(dense dense HalfCheetah-v4 $steps --hidden-sizes $size $size)" \
    "$(sparse 1:8 1 8 HalfCheetah-v4 $steps --hidden-sizes $size $size)"
done
[[ ${1:-all} =~ all|batches ]] && for batch in 64 128 256 512 1024; do
  $ours "$measure" --rounds 3 --threads 2 --first 1009 --out "$results/batch_$batch" \
    "$(dense dense HalfCheetah-v4 2000 --batch-size $batch)" "$(sparse 1:8 1 8 HalfCheetah-v4 2000 --batch-size $batch)"
done
[[ ${1:-all} =~ all|at_once ]] && for round in 1 2 3; do  # two runs of one thread each, two of two, then one of two
  for threads in 1 2; do
    for run in 1 2; do
      name="1:4, run $run of 2 at once, $threads per run"
      $ours "$measure" --rounds 1 --threads $threads "$(sparse "$name" 1 4 HalfCheetah-v4 4500)" &
    done
    wait
  done
  $ours "$measure" --rounds 1 --threads 2 "$(sparse "1:4, two threads" 1 4 HalfCheetah-v4 4500)"
done | grep x | tee "$results/at_once.txt"
cheetah="HalfCheetah-v4 3000"
[[ ${1:-all} == gpu ]] && $ours "$measure" --rounds 2 --threads 2 --first 1109 --out "$results/halfcheetah_gpu" \
  "LeanRL, GPU=$LEANRL_PYTHON $measure --drive leanrl $cheetah" \
  "dense, GPU=$ours $here/td3_continuous.py $(task $cheetah) --eval-interval 0" \
  "2:4 masked, GPU=$ours $here/rnm_td3_continuous.py $(task $cheetah) --eval-interval 0" \
  "2:4 semi_structured, GPU=$ours $here/rnm_td3_continuous.py $(task HalfCheetah-v4 1600) --eval-interval 0 --backend semi_structured" \
  "$(dense dense $cheetah --no-cuda)" "$(sparse 2:4 2 4 $cheetah --no-cuda)" "$(sparse 1:4 1 4 $cheetah --no-cuda)" \
  "$(sparse 1:8 1 8 $cheetah --no-cuda)"
exit 0
