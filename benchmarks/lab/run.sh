#!/usr/bin/env bash
# The paper's experiments: benchmarks/lab/run.sh [--budget short|evening|cpu|gpu-small|gpu] [--data DATA] [--output DIR] [--jobs N]
# Resumes where it was interrupted; runs that two experiments have in common are made once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

budget=short data= output= jobs=2
while [ $# -gt 0 ]; do
    case $1 in
        --budget) budget=$2 ;;
        --data) data=$2 ;;
        --output) output=$2 ;;
        --jobs) jobs=$2 ;;
        *) echo "run.sh: unknown argument $1; it takes --budget short|evening|cpu|gpu-small|gpu, --data DATA, --output DIR and --jobs N" >&2; exit 2 ;;
    esac
    shift 2
done
output=${output:-runs/lab-$budget}

bin="${VIRTUAL_ENV:-$PWD/.venv}/bin"

"$bin/python" -m benchmarks.lab.experiments --budget "$budget" ${data:+--data "$data"} --output "$output/suites" |
    while read -r suite; do
        only=()
        if [[ $suite == */robustness.yaml ]]; then only=(--only '*/validation-seed=*'); fi # its figure shows the search only
        "$bin/sbft" bench "$suite" --output-dir "$output" --jobs "$jobs" ${only[@]+"${only[@]}"} < /dev/null
    done
"$bin/python" -m benchmarks.lab.figures "$output" --output "$output/figures"
