"""Put the records of a suite's finished runs into one file beside its tables, as `results/` keeps them.

    python benchmarks/archive_runs.py runs/paper-table --output benchmarks/results/DEVICE/paper-table

The suite and its report are copied too; answers, logs and models are not. `sbft report` and `sbft bench` read the
archive as they read the runs' folders, so the tables can be made again, and an interrupted suite continues from it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from sbft.bench.archive import ARCHIVE_FILE, archive_runs
from sbft.bench.suite_runs import RUNS_FOLDER
from sbft.errors import SbftError

_BESIDE = ("suite.yaml", "suites", "report.md", "report.html", "*.csv", "*.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the suite's folder")
    parser.add_argument("--output", type=Path, required=True, help="the folder for the archive, created if missing")
    arguments = parser.parse_args()
    folder, output = arguments.folder, arguments.output
    output.mkdir(parents=True, exist_ok=True)
    try:
        count = archive_runs(folder / RUNS_FOLDER, output / ARCHIVE_FILE)
    except SbftError as error:
        sys.exit(f"Error: {error}")
    if output.resolve() != folder.resolve():
        for path in sorted(path for pattern in _BESIDE for path in folder.glob(pattern)):
            if path.is_dir():
                shutil.copytree(path, output / path.name, dirs_exist_ok=True)
            else:
                shutil.copy2(path, output / path.name)
    print(f"{count} runs: {output / ARCHIVE_FILE}")


if __name__ == "__main__":
    main()
