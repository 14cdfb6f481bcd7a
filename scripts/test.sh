#!/usr/bin/env bash
# Run every check: lint, types, the pages of docs/, tests. Makes .venv and installs what the tests require, if missing.
#
#   bash scripts/test.sh                        all but the longest tests
#   bash scripts/test.sh tests/unit -k moment   the checks, then these tests; arguments go to pytest
#   SBFT_LONG_TESTS=1 bash scripts/test.sh      the longest tests too: more than eight minutes on two cores
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh test
bin="${VIRTUAL_ENV:-$PWD/.venv}/bin"

"$bin/ruff" check .
"$bin/mypy"
NO_MKDOCS_2_WARNING=1 "$bin/mkdocs" build --strict --quiet
# Two workers with one thread each: the tests are many and small, and threads of several processes compete for the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
# No test compiles with torch, but importing bitsandbytes would load torch's compiler into each of some eighty processes.
export TORCHDYNAMO_DISABLE=1
"$bin/python" -m pytest -n "${SBFT_TEST_WORKERS:-2}" --dist worksteal "$@"
