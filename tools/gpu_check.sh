#!/usr/bin/env bash
# What only a machine with a GPU can say, in 15 minutes at most, all results in one folder (gpu-check, or the first argument).
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-check}
mkdir -p "$out"
export RECURRENT_LM_RUNS=$out/runs

step() {  # NAME SECONDS COMMAND...: its output in NAME.txt; what fails is said and does not end the rest
    local name=$1 seconds=$2 start=$SECONDS
    shift 2
    if timeout "$seconds" "$@" > "$out/$name.txt" 2>&1; then
        echo "| $name | ok | $((SECONDS - start)) s"
    else
        echo "| $name | failed or over $seconds s, see $out/$name.txt | $((SECONDS - start)) s"
    fi | tee -a "$out/summary.txt"
}

: > "$out/summary.txt"
step driver 20 nvidia-smi
step doctor 60 python -m models.forget_mult.doctor
step tests 120 python -m pytest -q -m gpu
speed="--cuda --rounds 5 --warmup 5 --results $out"
step speed 180 python benchmark.py speed $speed --only port AWD QRNN 'LSTM 650' 'RMC, p' --record gpu-fp32
step speed-bf16 180 python benchmark.py speed $speed --amp bf16 --only port AWD QRNN 'LSTM 650' 'RMC, p' --record gpu-bf16
step figure4 120 python benchmark.py figure4 $speed --record gpu-figure4
step train 110 python train_rmc.py --cuda --data pydocs --max-minutes 1.5 --save "$out/model.pt" --name rmc
step graphs 80 python train_rmc.py --cuda --cuda-graphs --data pydocs --max-minutes 0.5 --save "$out/graphs.pt" --name graphs
step generate 20 python generate.py --cuda --checkpoint "$out/model.pt" --words 200 --outf "$out/text.txt"
cat "$out/summary.txt"
