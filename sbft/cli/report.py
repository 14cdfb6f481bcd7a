"""`sbft report`: a table and a picture of the runs in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sbft.cli.errors import TracebackOption, shown_as_a_paragraph


def report(
    folder: Annotated[Path, typer.Argument(help="Folder that holds one folder a run, each with its run.json.")],
    traceback: TracebackOption = False,
) -> None:
    """Compare the runs in a folder: print their table, and write it and a picture beside them."""
    with shown_as_a_paragraph(traceback):
        from sbft.bench.report import footer, read_records, write_report

        text, table_path, picture = write_report(folder)
        print(f"{text}\n\n{footer(read_records(folder))}\n")
        print(f"Written: {table_path}" + ("" if picture is None else f", {picture}"))
