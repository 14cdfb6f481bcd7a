"""Writes the tables of docs/conformance.md from the committed table: `PYTHONPATH=scripts python -m conformance.page`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from conformance import results

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "conformance.md"
_COLUMNS = ("own", "ours", results.BY_DESIGN, results.OPEN)


def counts(table: dict[str, Any]) -> str:
    """A table of the recorded counts, with the versions."""
    rows = ["| suite | mode | pass with the library's own trainer | with sbft's too | by design | open |"]
    rows.append("|---" * 6 + "|")
    for suite, modes in table["counts"].items():
        for mode, count in modes.items():
            rows.append(f"| {suite} | {mode} | " + " | ".join(str(count[column]) for column in _COLUMNS) + " |")
    return "\n".join([*rows, "", table["recorded_with"].strip()])


def reasons(table: dict[str, Any]) -> str:
    """A table of the reasons in each mode, with the number of tests for each."""
    numbers: dict[tuple[str, str], int] = {}
    for suite, modes in table["suites"].items():
        for mode in modes:
            for line in results.lines_of(table, suite, mode):
                numbers[mode, line.because] = numbers.get((mode, line.because), 0) + len(line.tests)
    rows = ["| mode | tests | why |", "|---|---|---|"]
    for (mode, because), count in sorted(numbers.items(), key=lambda item: (item[0][0] == "default", -item[1])):
        rows.append(f"| {mode} | {count} | {because} |")
    return "\n".join(rows)


def filled(page: str, table: dict[str, Any]) -> str:
    """The page with both tables between their marks."""
    for mark, text in (("counts", counts(table)), ("reasons", reasons(table))):
        pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- {mark} end -->)", re.DOTALL)
        page = pattern.sub(lambda match, text=text: f"{match[1]}\n{text}\n\n{match[2]}", page)
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(), yaml.safe_load((HERE / "expected.yaml").read_text())))
