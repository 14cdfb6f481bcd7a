#!/usr/bin/env bash
# Run transformers' and TRL's own trainer tests as they are, then with sbft's trainer in the place of theirs, and compare with
# scripts/conformance/expected.yaml: every test that passes there and not here has a line in it, which says why. A test that
# newly fails without a line, fails otherwise than its line says, or passes in spite of one, ends this with exit code 1.
#
#   bash scripts/conformance.sh                              clones both libraries at the tags of the installed versions
#   bash scripts/conformance.sh --transformers DIR --trl DIR takes checkouts that are there
#   bash scripts/conformance.sh --suites trl-sft,trl-dpo --keep-baseline      some suites, the library's own results as before
#   bash scripts/conformance.sh --report                     compares the last results anew; --help names all options
#
# A suite runs in the modes that the table has for it. `mechanics` is sbft's trainer with the library's own optimizer and defaults
# (token_optimizer=None): whatever Trainer promises must hold to the number, of losses, checkpoints, callbacks, metrics.
# `default` is sbft as a user gets it: batch size 1, Adafactor in tokens, bfloat16 weights, released gradients; tests that assert
# numbers of AdamW at batch size 8 fail there by design. Nothing is loaded from a hub: models are tiny and made on the spot.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${CONFORMANCE_PYTHON:-}" ]; then
    bash scripts/setup.sh test
    CONFORMANCE_PYTHON="${VIRTUAL_ENV:-$PWD/.venv}/bin/python"
    "$CONFORMANCE_PYTHON" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
        parameterized optuna jmespath pytest-rerunfailures
fi
PYTHONPATH="$PWD:$PWD/scripts" exec "$CONFORMANCE_PYTHON" -m conformance "$@"
