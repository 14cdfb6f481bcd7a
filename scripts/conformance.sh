#!/usr/bin/env bash
# Run the trainer tests of transformers and TRL, first with their own trainers and then with sbft's, and compare the results with
# scripts/conformance/expected.yaml. Every test that fails only with sbft's trainer has an entry there, which says why. The exit code
# is 1 if a test newly fails without an entry, fails in another way than its entry says, or passes in spite of an entry.
#
#   bash scripts/conformance.sh                              clones both libraries at the tags of the installed versions
#   bash scripts/conformance.sh --transformers DIR --trl DIR uses existing checkouts
#   bash scripts/conformance.sh --suites trl-sft,trl-dpo --keep-baseline      only some suites, with the library's own results of before
#   bash scripts/conformance.sh --report                     compares the last results again; --help names all options
#
# A suite runs in the modes that expected.yaml has for it. `mechanics` is sbft's trainer with the library's own optimizer and defaults
# (token_optimizer=None): whatever Trainer promises must hold exactly, in losses, checkpoints, callbacks and metrics. `default` is sbft
# as a user gets it: batch size 1, Adafactor in tokens, bfloat16 weights, released gradients. Tests that assert AdamW's numbers at batch
# size 8 fail there by design. Nothing is loaded from a hub: the models are tiny and made on the spot.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${CONFORMANCE_PYTHON:-}" ]; then
    bash scripts/setup.sh test
    CONFORMANCE_PYTHON="${VIRTUAL_ENV:-$PWD/.venv}/bin/python"
    "$CONFORMANCE_PYTHON" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
        parameterized optuna jmespath pytest-rerunfailures
fi
PYTHONPATH="$PWD:$PWD/scripts" exec "$CONFORMANCE_PYTHON" -m conformance "$@"
