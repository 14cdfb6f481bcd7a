"""The results of a pytest run, and their comparison with the committed table."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
BY_DESIGN, OPEN = "by design", "open"


@dataclass(frozen=True)
class Result:
    """The result of one test: `PASSED`, `FAILED` or `SKIPPED`, and the first line of the exception if it failed."""

    outcome: str
    message: str = ""


def read(path: Path) -> dict[str, Result]:
    """The results in pytest's junit file by test, `module.Class::name`."""
    results = {}
    for case in ET.parse(path).getroot().iter("testcase"):
        result = Result(PASSED)
        for child in case:
            if child.tag in ("failure", "error"):
                result = Result(FAILED, " ".join((child.get("message") or "").split())[:2000])
            elif child.tag == "skipped":
                result = Result(SKIPPED)
        name = _name(str(case.get("classname")).split("."), str(case.get("name")))
        if name in results and results[name].outcome == FAILED:
            continue  # an error in the teardown is a separate case
        results[name] = result
    return results


def name_of(nodeid: str) -> str:
    """The same name, for a test as pytest collects it."""
    path, *classes, test = nodeid.split("::")
    return _name([*path.removesuffix(".py").split("/"), *classes], test)


def _name(places: list[str], test: str) -> str:
    first = next((i for i, place in enumerate(places) if place.startswith("test_")), 0)
    return f"{'.'.join(places[first:])}::{test}"


@dataclass(frozen=True)
class Line:
    """One entry of the table: tests of a suite that pass with the library's own trainer and fail with sbft's, for one reason.

    Attributes:
        verdict: `BY_DESIGN` or `OPEN`.
        because: the reason, a sentence.
        meets: regular expression that the message of each of these failures matches.
        tests: their names.
    """

    verdict: str
    because: str
    meets: str
    tests: tuple[str, ...]


@dataclass
class Comparison:
    """A suite's run with sbft's trainer, compared with one with the library's own, and with the table.

    Attributes:
        own: number of tests that pass with the library's own trainer.
        ours: number of them that pass with sbft's too.
        unexplained: tests that newly fail, with their messages.
        no_longer_needed: tests in the table that pass.
        otherwise: tests that fail in another way than the table says, with their messages.
        absent: tests in the table that this checkout lacks, or that do not pass with the library's own trainer.
        explained: tests that fail as the table says, by verdict.
    """

    own: int = 0
    ours: int = 0
    unexplained: dict[str, str] = field(default_factory=dict)
    no_longer_needed: list[str] = field(default_factory=list)
    otherwise: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    explained: dict[str, list[str]] = field(default_factory=lambda: {BY_DESIGN: [], OPEN: []})

    @property
    def agrees(self) -> bool:
        """Whether the run agrees with the table."""
        return not (self.unexplained or self.no_longer_needed or self.otherwise)


def compare(own: dict[str, Result], ours: dict[str, Result], lines: list[Line]) -> Comparison:
    """Compares which tests pass in `own` and in `ours`, given the table's lines."""
    comparison = Comparison()
    line_of = {test: line for line in lines for test in line.tests}
    for test, result in own.items():
        if result.outcome != PASSED:
            continue
        comparison.own += 1
        here = ours.get(test, Result(FAILED, "it was not run"))
        if here.outcome == PASSED:
            comparison.ours += 1
            if test in line_of:
                comparison.no_longer_needed.append(test)
        elif test not in line_of:
            comparison.unexplained[test] = here.message if here.outcome == FAILED else "it was skipped"
        elif not re.search(line_of[test].meets, here.message):
            comparison.otherwise[test] = here.message
        else:
            comparison.explained[line_of[test].verdict].append(test)
    comparison.absent = [test for test in line_of if own.get(test, Result(SKIPPED)).outcome != PASSED]
    return comparison


def lines_of(table: dict[str, Any], suite: str, mode: str) -> list[Line]:
    """The table's lines for a suite in a mode.

    Raises:
        ValueError: if a line has an unknown verdict, no reason, or a test twice.
    """
    lines = [
        Line(entry["verdict"], entry["because"].strip(), entry["meets"], tuple(entry["tests"]))
        for entry in (table["suites"].get(suite) or {}).get(mode) or []
    ]
    tests = [test for line in lines for test in line.tests]
    twice = sorted({test for test in tests if tests.count(test) > 1})
    if twice:
        raise ValueError(f"The table has {', '.join(twice)} twice in {suite}, {mode}.")
    for line in lines:
        if line.verdict not in (BY_DESIGN, OPEN) or not line.because:
            raise ValueError(
                f"{line.tests[0]} has verdict {line.verdict!r}; expected {BY_DESIGN!r} or {OPEN!r}, and a reason."
            )
    return lines
