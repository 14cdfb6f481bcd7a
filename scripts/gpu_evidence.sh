#!/usr/bin/env bash
# Everything that only a GPU can show, in about fifteen minutes and without network:
#
# - tests of the kernels, and of steps as graphs against plain ones
# - the optimizer step on 4096x11008, and on the shapes of Llamas with 1B and 8B parameters
# - whole training steps of both, and of SmolLM2, whose hundreds of small weights take the host longest; with updates in
#   common launches, and one by one
# - steps as graphs
# - predicted against measured memory
#
#     OUT=benchmarks/results/h100 scripts/gpu_evidence.sh
#
# Requires torch with CUDA, triton, transformers, peft and pytest; PYTHON names the interpreter (default python3). A part that fails
# or exceeds its time limit is reported at the end; the other parts still run.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

device=$("$python" - <<'END'
import re
import torch

if not torch.cuda.is_available():
    raise SystemExit("gpu_evidence.sh: torch sees no CUDA device here")
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))
END
) || exit 1
out=${OUT:-benchmarks/results/$device}
mkdir -p "$out"
failed=()

part() { # part NAME SECONDS COMMAND...: its output also goes to NAME.log
    local name=$1 seconds=$2 status
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || failed+=("$name (exit $status)")
}

# An optimizer whose first step takes longer than --limit-s, because it compiles, gets a row that says so.
part kernels 170 "$python" -m pytest -p no:cacheprovider -m gpu tests/unit/optim/test_kernels_cuda.py tests/unit/training/graphs/test_cuda_graph.py \
    tests/unit/training/graphs/test_graphed.py tests/unit/training/batches/test_batch_counts.py
part optimizer_step_4096x11008 55 "$python" benchmarks/optimizer_step.py --model 4096x11008 --rounds 5 --steps 5 \
    --limit-s 20 --json "$out/optimizer_step_4096x11008.json"
part optimizer_step_llama-1b 80 "$python" benchmarks/optimizer_step.py --model llama-1b --rounds 3 \
    --limit-s 30 --json "$out/optimizer_step_llama-1b.json"
part optimizer_step_llama-8b 110 "$python" benchmarks/optimizer_step.py --model llama-8b --rounds 2 \
    --limit-s 30 --json "$out/optimizer_step_llama-8b.json"
part training_step_llama-1b 115 "$python" benchmarks/training_step.py --model llama-1b \
    --methods sbft sbft-one-by-one sbft-frozen-embeddings lora adam --tokens 512 --steps 8 --repeats 1 \
    --json "$out/training_step_llama-1b.json"
part training_step_smollm2-135m 110 "$python" benchmarks/training_step.py --model smollm2-135m \
    --methods sbft sbft-one-by-one sbft-graphs lora --tokens 64 --steps 16 --repeats 1 --json "$out/training_step_smollm2-135m.json"
part training_step_llama-8b 110 "$python" benchmarks/training_step.py --model llama-8b \
    --methods sbft sbft-one-by-one sbft-frozen-embeddings lora --tokens 512 --steps 8 --repeats 1 \
    --json "$out/training_step_llama-8b.json"
part graphed_steps_30m 140 "$python" benchmarks/graphed_steps.py --model scratch:30m --steps 40 --json "$out/graphed_steps_30m.json"
# Nothing else may be on the GPU: three at once fill 80 GB.
part memory_prediction 200 "$python" benchmarks/memory_prediction.py --large --jobs 3 --json "$out/memory_prediction.json"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'gpu_evidence.sh: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "gpu_evidence.sh: all results are in $out"
