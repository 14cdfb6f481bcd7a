#!/usr/bin/env bash
# Choose the learning rates of the quickstart: train every method over a grid of the same width, measure on the validation part
# (never on the part that the quickstart reports), and print the table. This takes a quarter of an hour on two cores.
#
#   bash scripts/choose_learning_rate.sh          all methods, or those named: sbft, lora, nearest
#
# Records are in runs/learning-rate; finished runs are not repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
sbft="${VIRTUAL_ENV:-$PWD/.venv}/bin/sbft"
runs="${LEARNING_RATE_DIR:-runs/learning-rate}"

try() { # recipe, name, rates
    for rate in "${@:3}"; do
        folder="$runs/$2-$rate"
        if grep -qs '"status": "ok"' "$folder/run.json"; then continue; fi
        "$sbft" train "$1" --output-dir "$folder" --overwrite --set training.learning_rate="$rate" \
            --set data.eval_size=null --set evaluation.before=false
    done
}
for method in "${@:-sbft lora nearest}"; do
    case "$method" in
        *sbft*) try quickstart sbft 1e-3 3e-4 1e-4 3e-3 ;;&
        *lora*) try quickstart-lora lora 1e-3 5e-4 2e-3 2e-4 ;;&
        *nearest*) try quickstart-nearest nearest 1e-3 ;; # at the rate of sbft, which shows the effect of rounding alone
    esac
done
"$sbft" report "$runs"
