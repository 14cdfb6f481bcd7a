"""`sbft report`: tables and pictures of the runs in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sbft.cli.shared.verb import verb


@verb
def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a suite, or a folder of runs, each with its run.json.")
    ],
    peft_json: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Also write the suite's results to DIR, in the schema of PEFT's method comparison."
        ),
    ] = None,
) -> None:
    """Compare the runs in a folder, in tables and pictures.

    The table is printed. Table and pictures are saved in the folder.
    """
    from sbft.bench.report import export_peft_json, write_report

    written = write_report(folder)
    files = [*written.files, *([] if peft_json is None else export_peft_json(folder, peft_json))]
    print(f"{written.text}\n\nWritten: {', '.join(map(str, files))}")
    if written.warning is not None:
        print(f"Warning: {written.warning}")
