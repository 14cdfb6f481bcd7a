"""The driver behind scripts/conformance.sh, which says what it is for."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from conformance import results
from conformance.results import BY_DESIGN, OPEN, Comparison

HERE = Path(__file__).parent
TABLE = HERE / "expected.yaml"
REPOSITORIES = {
    "transformers": "https://github.com/huggingface/transformers",
    "trl": "https://github.com/huggingface/trl",
}
MODES = ("mechanics", "default")  # conformance.sh says what they are
SECONDS_PER_RUN = 3600


@dataclass(frozen=True)
class Suite:
    """Tests of one library: their paths in its checkout, and what of them is left out with the reason beside it."""

    library: str
    tests: tuple[str, ...]
    options: tuple[str, ...] = ()


SUITES = {
    "transformers": Suite(
        "transformers",
        ("tests/trainer",),
        (
            "--ignore=tests/trainer/distributed",  # several processes on GPUs
            "--ignore=tests/trainer/test_data_collator.py",  # no trainer in it
        ),
    ),
    **{
        f"trl-{name}": Suite("trl", (f"tests/test_{name}_trainer.py",))
        for name in ("sft", "dpo", "kto", "reward", "grpo", "rloo")
    },
}


def main() -> int:
    """Runs what is asked for; returns the exit code."""
    arguments = _parser().parse_args()
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    table = yaml.safe_load(TABLE.read_text())
    suites = arguments.suites
    checkouts = {
        library: getattr(arguments, library) or _clone(library, output)
        for library in dict.fromkeys(SUITES[suite].library for suite in suites)
    }
    agrees = True
    for suite in suites:
        checkout = Path(checkouts[SUITES[suite].library]).resolve()
        own = _run(suite, "baseline", checkout, output, again=not arguments.keep_baseline)
        recorded = list(table["suites"].get(suite, {}))
        for mode in recorded if arguments.modes is None else arguments.modes:
            passing = [test for test, result in own.items() if result.outcome == results.PASSED]
            ours = _run(suite, mode, checkout, output, again=not arguments.report, only=passing)
            found = results.compare(own, ours, results.lines_of(table, suite, mode))
            _tell(suite, mode, found)
            agrees &= found.agrees
            (output / f"{suite}-{mode}.json").write_text(json.dumps(vars(found), indent=1) + "\n")
    return 0 if agrees else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="conformance.sh", description=__doc__)
    for library in REPOSITORIES:
        parser.add_argument(
            f"--{library}",
            type=Path,
            default=os.environ.get(f"{library.upper()}_CHECKOUT"),
            help=f"checkout of {library} (or {library.upper()}_CHECKOUT); without it one is cloned at v{version(library)}",
        )
    parser.add_argument("--suites", type=_names, default=list(SUITES), help=f"some of {','.join(SUITES)}")
    parser.add_argument(
        "--modes", type=_names, help=f"some of {','.join(MODES)}; those that the table has of a suite without it"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/conformance"), help="folder for results and clones")
    parser.add_argument("--keep-baseline", action="store_true", help="take the library's own results of a former call")
    parser.add_argument("--report", action="store_true", help="take all results of a former call, and compare anew")
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _clone(library: str, output: Path) -> Path:
    """A checkout at the tag of the installed version."""
    tag = f"v{version(library)}"
    folder = output / f"{library}-{tag}"
    if not folder.is_dir():
        command = ["git", "clone", "--quiet", "--depth", "1", "--branch", tag, REPOSITORIES[library], str(folder)]
        if subprocess.run(command, check=False).returncode:
            sys.exit(
                f"{REPOSITORIES[library]} could not be cloned at {tag}. Name a checkout with --{library} DIR, at that tag "
                "or one near to it."
            )
    return folder


def _run(
    suite: str, mode: str, checkout: Path, output: Path, again: bool, only: list[str] | None = None
) -> dict[str, results.Result]:
    """Runs a suite, or some of its tests alone, in one mode, or reads what a former call found."""
    found = output / f"{suite}-{mode}.xml"
    if again or not found.exists():
        _pytest(suite, mode, checkout, output, found, only)
    return results.read(found)


def _pytest(suite: str, mode: str, checkout: Path, output: Path, found: Path, only: list[str] | None) -> None:
    library = SUITES[suite].library
    places = [str(HERE.parents[1]), str(HERE.parent), str(checkout)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(places),
        "CONFORMANCE_MODE": mode,
        "CONFORMANCE_LIBRARY": library,
        "HF_HUB_OFFLINE": "1",  # what is not made on the spot is skipped, or fails in both runs
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if only is not None:
        chosen = found.with_suffix(".txt")
        chosen.write_text("\n".join(only))
        environment["CONFORMANCE_ONLY"] = str(chosen)
    if library == "trl":
        environment["CONFORMANCE_HUB"] = str(_hub(checkout, output, environment))
    command = [sys.executable, "-m", "pytest", "-p", "conformance.plugin", "-p", "no:cacheprovider", "-q", "--tb=short"]
    command += [*SUITES[suite].options, f"--junitxml={found}", *SUITES[suite].tests]
    found.unlink(missing_ok=True)
    print(f"{suite}, {mode}: running", flush=True)
    with found.with_suffix(".log").open("w") as log:
        subprocess.run(
            command, cwd=checkout, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=SECONDS_PER_RUN, check=False
        )
    if not found.exists() or not any(one.outcome == results.PASSED for one in results.read(found).values()):
        sys.exit(f"No test of {suite} passed in the run {mode}. Look at {log.name}.")


def _hub(checkout: Path, output: Path, environment: dict[str, str]) -> Path:
    hub = output / "hub"
    if not (hub / "data").is_dir():
        command = [sys.executable, str(HERE / "tiny_hub.py"), str(checkout), str(hub)]
        log = output / "hub.log"
        with log.open("w") as lines:
            if subprocess.run(command, env=environment, stdout=lines, stderr=subprocess.STDOUT, check=False).returncode:
                sys.exit(f"The tiny models and data sets for TRL's tests could not be made. Look at {log}.")
    return hub


def _tell(suite: str, mode: str, found: Comparison) -> None:
    by_design, left_open = len(found.explained[BY_DESIGN]), len(found.explained[OPEN])
    print(
        f"{suite}, {mode}: {found.own} pass with the library's own trainer, {found.ours} of them with sbft's; "
        f"{by_design} fail by design, {left_open} are open"
    )
    lists: list[tuple[str, Any]] = [
        ("fails and is not in the table", found.unexplained),
        ("fails otherwise than the table says", found.otherwise),
        ("passes, its line is no longer needed", found.no_longer_needed),
        ("is in the table, and not among the tests that pass with the library's own trainer", found.absent),
    ]
    for what, tests in lists:
        for test in tests:
            message = f": {tests[test][:300]}" if isinstance(tests, dict) else ""
            print(f"  {test} {what}{message}")


if __name__ == "__main__":
    sys.exit(main())
