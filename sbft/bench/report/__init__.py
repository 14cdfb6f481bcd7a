"""Reports: of a suite, or a table and a picture of any runs in one folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sbft import files
from sbft.bench.report import page, plain
from sbft.bench.report.comparison import Comparison, compare
from sbft.bench.report.notes import summary
from sbft.bench.report.peft_json import write_peft_json
from sbft.bench.report.pictures import draw
from sbft.bench.report.spreadsheets import write_runs, write_summary
from sbft.bench.report.tables import short_table
from sbft.bench.suite_runs import stored_suite
from sbft.errors import DataError, how_to_install

__all__ = ["Report", "export_peft_json", "write_report"]


@dataclass
class Report:
    """What was written."""

    text: str
    """The most important results, for a terminal."""
    files: list[Path] = field(default_factory=list)
    warning: str | None = None
    """What is missing, and what to type to get it."""


def write_report(folder: Path) -> Report:
    """Write a folder's report into it: that of a suite, finished or not, or of any runs.

    Without matplotlib there are no pictures, and the report's warning says so.

    Args:
        folder: a suite's, with `suite.yaml`, or one that contains a folder for each run.

    Raises:
        DataError: if there is no run.
        RecipeError: if the suite cannot be read.
    """
    suite = stored_suite(folder)
    return _of_runs(folder) if suite is None else _of_suite(compare(suite, folder))


def export_peft_json(folder: Path, to: Path) -> list[Path]:
    """Write a suite's test runs in the schema of PEFT's method comparison, one file per run.

    Args:
        folder: the suite's.
        to: the folder for the files; made if needed.

    Raises:
        DataError: if `folder` is not a suite's, or none of its test runs is finished.
    """
    suite = stored_suite(folder)
    if suite is None:
        raise DataError(
            f"{folder} is not the folder of a suite: it has no suite.yaml, which says which runs to compare. Make one with: "
            "sbft bench SUITE"
        )
    comparison = compare(suite, folder)
    if not any(made.record for row in comparison.rows for made in row.tested):
        raise DataError(f"No test run of the suite in {folder} is finished yet. Continue with: sbft bench SUITE")
    return write_peft_json(comparison, to)


def _of_suite(comparison: Comparison) -> Report:
    folder, warning = comparison.folder, None
    try:
        pictures = draw(comparison)
    except ImportError as error:
        pictures, warning = [], _without_pictures(error)
    texts = {"report.md": page.markdown(comparison, pictures), "report.html": page.page(comparison, pictures)}
    for name, text in texts.items():
        files.write_text(folder / name, text)
    write_runs(comparison, folder / "runs.csv")
    write_summary(comparison, folder / "summary.csv")
    names = [*texts, "runs.csv", "summary.csv", *(picture.path.name for picture in pictures)]
    return Report(_for_terminal(comparison), [folder / name for name in names], warning)


def _for_terminal(comparison: Comparison) -> str:
    parts = []
    for title, rows in comparison.groups():
        table = short_table(comparison, rows)
        parts += [title, table.markdown(), "\n".join(table.notes())]
    return "\n\n".join(part for part in (*parts, summary(comparison)) if part)


def _of_runs(folder: Path) -> Report:
    records = plain.read_records(folder)
    text = f"{plain.table(records).markdown()}\n\n{plain.footer(records)}"
    files.write_text(folder / plain.TABLE_FILE, text + "\n")
    report = Report(text, [folder / plain.TABLE_FILE])
    if shown := plain.measured(records):
        try:
            plain.draw(shown, folder / plain.PICTURE_FILE)
        except ImportError as error:
            report.warning = _without_pictures(error)
        else:
            report.files.append(folder / plain.PICTURE_FILE)
    return report


def _without_pictures(error: ImportError) -> str:
    if error.name is None or not error.name.startswith("matplotlib"):
        raise error
    return "There are no pictures, because matplotlib is not installed. " + how_to_install("'sbft[report]'")
