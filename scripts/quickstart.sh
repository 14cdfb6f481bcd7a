#!/usr/bin/env bash
# Fine-tune the built-in model on a generated task, three times, and compare:
#
#   sbft      all weights, stochastic rounding
#   nearest   the same with rounding to nearest, which loses small updates to bfloat16 weights
#   lora      PEFT LoRA
#
# First makes .venv and installs what is missing. It is safe to run this again: it then installs nothing, and repeats the training.
# Records, models and predictions are in runs/quickstart/NAME afterwards, next to the table and the picture.
# Arguments go to every `sbft train`, for example --set data.train_size=100; QUICKSTART_DIR names another folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
sbft="${VIRTUAL_ENV:-$PWD/.venv}/bin/sbft"
runs="${QUICKSTART_DIR:-runs/quickstart}"

train() { # recipe, name of its run, further arguments
    echo
    echo "== sbft train $1"
    "$sbft" train "$1" --output-dir "$runs/$2" --overwrite "${@:3}"
}
train quickstart sbft "$@"
train quickstart-nearest nearest "$@"
train quickstart-lora lora "$@"
echo
"$sbft" report "$runs"
