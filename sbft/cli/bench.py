"""`sbft bench`: run a suite, and write its report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sbft.cli.shared import completion
from sbft.cli.shared.starting import starting
from sbft.cli.shared.verb import verb

if TYPE_CHECKING:
    from sbft.bench.schedule import Planned
    from sbft.bench.suite import Suite


@verb
def bench(
    suite: Annotated[
        str | None,
        typer.Argument(
            help="YAML file, or a suite that ships with sbft. Without it, the shipped suites are listed.",
            autocompletion=completion.suites_and_files,
        ),
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder for the runs; default: runs/SUITE.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and how long they will take; run nothing.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Run only a task, a method, or a pattern such as 'task/sbft*/*'. Repeatable."
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Parallel runs, with --ray on each machine; default: one per GPU, or one on a CPU."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS|local",
            help="Run on a Ray cluster: HOST:PORT, ray://HOST:PORT, or auto; local starts one on this machine.",
        ),
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Repeat the runs that failed.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of the suite: seeds=[0]. Repeatable."),
    ] = None,
) -> None:
    """Compare methods: run a suite and write its report.

    Finished runs are kept: after a stop, the same command continues with the rest.
    """
    with starting():
        from sbft.bench.schedule import listing
        from sbft.bench.suite import find_suite, load_suite, uneven_grids
    if suite is None:
        _list_suites()
        return
    loaded = load_suite(suite, overrides)
    folder = output_dir or Path("runs") / find_suite(suite).stem
    _refuse_if_nothing_matches(loaded, folder, only or [])
    if note := uneven_grids(loaded):
        print(f"Note: {note}")
    if dry_run:
        print(listing(_wanted_runs(loaded, folder, only or [], retry), jobs or 1))
        return
    _run(loaded, folder, only or [], jobs, ray, retry)
    _report(folder)


def _list_suites() -> None:
    from sbft.bench.suite import load_suite, suite_names

    names = suite_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {load_suite(name).summary}")
    print("\nNext: sbft bench quick, or sbft bench paper-table --dry-run to see what it would run.")


def _refuse_if_nothing_matches(suite: Suite, folder: Path, only: list[str]) -> None:
    from sbft.bench.schedule import is_selected, plan
    from sbft.errors import RecipeError

    names = [run.name for run in plan(suite, folder)]
    for pattern in only:
        if not any(is_selected(name, [pattern]) for name in names):
            raise RecipeError(
                f"--only {pattern} matches no run. A run is called TASK/METHOD/lr=RATE/PHASE-seed=N; tasks are "
                f"{', '.join(suite.tasks)}, methods {', '.join(suite.methods)}, phases validation and test. The first "
                f"run is {names[0]}."
            )


def _wanted_runs(suite: Suite, folder: Path, only: list[str], retry: bool) -> list[Planned]:
    """The planned runs that `--only` selects. With `--retry`, failed runs are to do again."""
    from dataclasses import replace

    from sbft.bench.schedule import is_selected, plan

    planned = [run for run in plan(suite, folder) if is_selected(run.name, only)]
    return [replace(run, record=None) if retry and run.state == "failed" else run for run in planned]


def _run(suite: Suite, folder: Path, only: list[str], jobs: int | None, ray: str | None, retry: bool) -> None:
    from sbft.bench.runner import check_same, prepare
    from sbft.bench.schedule import plan

    check_same(suite, folder, retry=retry)
    if any(run.state == "to do" for run in _wanted_runs(suite, folder, only, retry)):
        _make(suite, folder, only, jobs, ray, retry)
    else:
        prepare(suite, folder, retry=retry, only=only)
    planned = plan(suite, folder)
    count = {state: sum(run.state == state for run in planned) for state in ("done", "failed", "to do")}
    runs = f"{len(planned)} run{'s' * (len(planned) != 1)}"
    print(f"{runs}: {count['done']} done, {count['failed']} failed, {count['to do']} to do.")
    for reason in dict.fromkeys(run.hopeless for run in planned if run.hopeless is not None):
        print(reason)
    if count["to do"] and only:
        print("Runs still to do are excluded by --only, or wait for validation runs that are.")
    if count["failed"]:
        print("To repeat the failed runs, type the same command with --retry.")


def _make(suite: Suite, folder: Path, only: list[str], jobs: int | None, ray: str | None, retry: bool) -> None:
    from contextlib import nullcontext

    from rich.console import Console

    from sbft.bench.active_run import Place
    from sbft.bench.live import SuiteProgress
    from sbft.bench.machine import ThisMachine
    from sbft.bench.ray.cluster import Cluster
    from sbft.bench.runner import prepare, run_suite
    from sbft.bench.suite_check import check_recipes

    # First of all, because a missing cluster shows at once.
    with nullcontext() if ray is None else Cluster(ray, suite, folder, jobs) as cluster:
        gpus = check_recipes(suite)
        place: Place = cluster or ThisMachine(jobs or max(len(gpus), 1), gpus)
        prepare(suite, folder, retry=retry, only=only)
        with SuiteProgress(Console(highlight=False), suite, folder, place.jobs) as progress:
            run_suite(suite, folder, progress, only=only, place=place)


def _report(folder: Path) -> None:
    from sbft.bench.report import write_report

    report = write_report(folder)
    print(f"\n{report.text}\n\nWritten: {', '.join(map(str, report.files))}")
    if report.warning is not None:
        print(f"Warning: {report.warning}")
    print(f"The runs are in {folder}/runs. To write the report again, type: sbft report {folder}")
