#!/usr/bin/env bash
# Quantizes a 135M model on two processes and compares it with the float and the rounded model.
# Usage: tools/demo.sh [OUT]   (OUT: folder for the quantized model, runs/demo unless given)
# A second call resumes; measurements already taken are kept beside OUT as OUT.*.json.
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-runs/demo}
[[ $# -eq 0 || $out = /* ]] || out=$caller/$out
out=${out%/}

source tools/env.sh
data=.cache/demo
model=$data/SmolLM2-135M
# two processes share the cores
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$("$python" -c 'import os; print(max(1, os.cpu_count() // 2))')}
torchrun=(.venv/bin/torchrun --nproc-per-node 2)

# record FILE COMMAND...: shows the command's output and keeps the last line in FILE, unless FILE exists.
record() {
    local file=$1
    shift
    "$@" | tee "$file.part"
    if [[ -s $file ]]; then
        rm "$file.part"
    else
        tail -n 1 "$file.part" > "$file.line"
        rm "$file.part"
        mv "$file.line" "$file"
    fi
}

# evaluate NAME MODEL [OPTION...]: measures perplexity into OUT.NAME.json, once.
evaluate() {
    local file=$out.$1.json
    if [[ -s $file ]]; then
        echo "evaluation of the $1 model: kept, $file"
        return
    fi
    echo "evaluating the $1 model"
    record "$file" "${torchrun[@]}" launch/evaluate.py --model "$2" "${@:3}" \
        --eval.dataset $data/heldout.jsonl --eval.sequence_length 1024 --eval.samples 10
}

"$python" tools/fetch_demo.py $data

mkdir -p "$(dirname "$out")"
# without OUT its measurements describe a model that is gone
[[ -e $out ]] || rm -f "$out".{run,float,rtn,quantized}.json

echo "quantizing into $out"
record "$out.run.json" "${torchrun[@]}" launch/quantize.py --config configs/demo.yaml \
    --model $model --calib.dataset $data/calibration.jsonl --output "$out"

evaluate float $model
evaluate rtn $model --quant.method rtn
evaluate quantized "$out"

"$python" tools/demo_table.py --model $model --output "$out"
echo "both models continue a prompt"
"$python" tools/demo_prompt.py --model $model --output "$out"
