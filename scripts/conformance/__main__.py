"""The program behind scripts/conformance.sh, which describes it."""

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
    """Tests of one library: their paths in its checkout, and pytest options that leave some out."""

    library: str
    tests: tuple[str, ...]
    options: tuple[str, ...] = ()


SUITES = {
    "transformers": Suite(
        "transformers",
        ("tests/trainer",),
        (
            "--ignore=tests/trainer/distributed",  # several processes on GPUs
            "--ignore=tests/trainer/test_data_collator.py",  # does not use a trainer
        ),
    ),
    **{
        f"trl-{name}": Suite("trl", (f"tests/test_{name}_trainer.py",))
        for name in ("sft", "dpo", "kto", "reward", "grpo", "rloo")
    },
}


def main() -> int:
    """Runs the requested suites; returns the exit code."""
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
            comparison = results.compare(own, ours, results.lines_of(table, suite, mode))
            _tell(suite, mode, comparison)
            agrees &= comparison.agrees
            (output / f"{suite}-{mode}.json").write_text(json.dumps(vars(comparison), indent=1) + "\n")
    return 0 if agrees else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="conformance.sh", description=__doc__)
    for library in REPOSITORIES:
        parser.add_argument(
            f"--{library}",
            type=Path,
            default=os.environ.get(f"{library.upper()}_CHECKOUT"),
            help=f"checkout of {library} (or {library.upper()}_CHECKOUT); by default v{version(library)} is cloned",
        )
    parser.add_argument("--suites", type=_names, default=list(SUITES), help=f"some of {','.join(SUITES)}")
    parser.add_argument(
        "--modes", type=_names, help=f"some of {','.join(MODES)}; by default those that the table has for a suite"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/conformance"), help="folder for results and clones")
    parser.add_argument("--keep-baseline", action="store_true", help="use the library's own results of an earlier call")
    parser.add_argument(
        "--report", action="store_true", help="use all results of an earlier call, and compare them again"
    )
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
                "or one close to it."
            )
    return folder


def _run(
    suite: str, mode: str, checkout: Path, output: Path, again: bool, only: list[str] | None = None
) -> dict[str, results.Result]:
    """Runs a suite, or some of its tests, in one mode; or reads the results of an earlier call."""
    report = output / f"{suite}-{mode}.xml"
    if again or not report.exists():
        _pytest(suite, mode, checkout, output, report, only)
    return results.read(report)


def _pytest(suite: str, mode: str, checkout: Path, output: Path, report: Path, only: list[str] | None) -> None:
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
        names = report.with_suffix(".txt")
        names.write_text("\n".join(only))
        environment["CONFORMANCE_ONLY"] = str(names)
    if library == "trl":
        environment["CONFORMANCE_HUB"] = str(_hub(checkout, output, environment))
    command = [sys.executable, "-m", "pytest", "-p", "conformance.plugin", "-p", "no:cacheprovider", "-q", "--tb=short"]
    command += [*SUITES[suite].options, f"--junitxml={report}", *SUITES[suite].tests]
    report.unlink(missing_ok=True)
    print(f"{suite}, {mode}: running", flush=True)
    with report.with_suffix(".log").open("w") as log:
        subprocess.run(
            command,
            cwd=checkout,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=SECONDS_PER_RUN,
            check=False,
        )
    if not report.exists() or not any(result.outcome == results.PASSED for result in results.read(report).values()):
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


def _tell(suite: str, mode: str, comparison: Comparison) -> None:
    by_design, left_open = len(comparison.explained[BY_DESIGN]), len(comparison.explained[OPEN])
    print(
        f"{suite}, {mode}: {comparison.own} pass with the library's own trainer, {comparison.ours} of them with sbft's; "
        f"{by_design} fail by design, {left_open} are open"
    )
    lists: list[tuple[str, Any]] = [
        ("fails and is not in the table", comparison.unexplained),
        ("fails in another way than the table says", comparison.otherwise),
        ("passes, so its entry is no longer needed", comparison.no_longer_needed),
        ("is in the table, but does not pass with the library's own trainer", comparison.absent),
    ]
    for what, tests in lists:
        for test in tests:
            message = f": {tests[test][:300]}" if isinstance(tests, dict) else ""
            print(f"  {test} {what}{message}")


if __name__ == "__main__":
    sys.exit(main())
