"""The comparison of scripts/conformance.sh, its committed table, and the page that shows it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "scripts"))

from conformance import page, removed_names, results  # noqa: E402
from conformance.results import BY_DESIGN, FAILED, OPEN, PASSED, SKIPPED, Line, Result  # noqa: E402

TABLE = yaml.safe_load((ROOT / "scripts" / "conformance" / "expected.yaml").read_text())
LOST = Line(BY_DESIGN, "float16 is refused.", r"^sbft\.errors\.ModelError", ("test_a.T::test_half",))


def failed(message: str) -> Result:
    return Result(FAILED, message)


def test_a_test_that_newly_fails_without_a_line_does_not_agree() -> None:
    own = {"test_a.T::test_x": Result(PASSED), "test_a.T::test_y": failed("theirs"), "test_a.T::test_z": Result(SKIPPED)}
    found = results.compare(own, {name: failed("KeyError: 'input_ids'") for name in own}, [])
    assert (found.own, found.ours, found.agrees) == (1, 0, False)
    assert found.unexplained == {"test_a.T::test_x": "KeyError: 'input_ids'"}


@pytest.mark.parametrize("here", [{}, {"test_a.T::test_x": Result(SKIPPED)}])
def test_a_test_that_did_not_run_counts_as_lost(here: dict[str, Result]) -> None:
    assert not results.compare({"test_a.T::test_x": Result(PASSED)}, here, []).agrees


def test_a_line_explains_the_failure_it_names_alone() -> None:
    own = {"test_a.T::test_half": Result(PASSED)}
    as_said = results.compare(own, {"test_a.T::test_half": failed("sbft.errors.ModelError: float16")}, [LOST])
    assert as_said.agrees and as_said.explained[BY_DESIGN] == ["test_a.T::test_half"]
    otherwise = results.compare(own, {"test_a.T::test_half": failed("KeyError: 'x'")}, [LOST])
    assert not otherwise.agrees and otherwise.otherwise == {"test_a.T::test_half": "KeyError: 'x'"}


def test_a_line_whose_test_passes_again_is_no_longer_needed() -> None:
    passing = {"test_a.T::test_half": Result(PASSED)}
    found = results.compare(passing, passing, [LOST])
    assert not found.agrees and found.no_longer_needed == ["test_a.T::test_half"]


def test_a_line_of_another_version_is_named_and_does_no_harm() -> None:
    found = results.compare({}, {}, [LOST])
    assert found.agrees and found.absent == ["test_a.T::test_half"]


INNER = """
import pytest
class TestOne:
    def test_passes(self): pass
    def test_raises(self): raise ValueError("first line\\nsecond")
    @pytest.mark.skip
    def test_skips(self): pass
    @pytest.fixture
    def broken(self): raise OSError("no")
    def test_errs(self, broken): pass
"""


def test_results_are_read_from_pytests_own_file(tmp_path: Path) -> None:
    (tmp_path / "test_inner.py").write_text(INNER)
    command = [sys.executable, "-m", "pytest", "-q", "--junitxml=out.xml", "--rootdir=.", "test_inner.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    found = results.read(tmp_path / "out.xml")
    assert {name.split("::")[1]: one.outcome for name, one in found.items()} == {
        "test_passes": PASSED,
        "test_raises": FAILED,
        "test_skips": SKIPPED,
        "test_errs": FAILED,
    }
    assert found["test_inner.TestOne::test_raises"].message.startswith("ValueError: first line")


def test_names_that_a_library_has_no_longer_fail_when_they_are_used(tmp_path: Path) -> None:
    module = tmp_path / "test_old.py"
    lines = ["from transformers.trainer_utils import set_seed, GoneOne", "from transformers.utils import is_gone_available"]
    module.write_text("\n".join(lines))
    import transformers.trainer_utils
    import transformers.utils

    assert removed_names.stand_in_for(module) == ["transformers.trainer_utils.GoneOne", "transformers.utils.is_gone_available"]
    try:
        assert not transformers.utils.is_gone_available()
        with pytest.raises(ImportError, match="GoneOne is not in the installed version"):
            transformers.trainer_utils.GoneOne()
    finally:
        del transformers.trainer_utils.GoneOne, transformers.utils.is_gone_available


def all_lines() -> list[tuple[str, str, Line]]:
    return [
        (suite, mode, line)
        for suite, modes in TABLE["suites"].items()
        for mode in modes
        for line in results.lines_of(TABLE, suite, mode)
    ]


def test_nothing_in_the_table_is_open_and_every_reason_is_a_sentence() -> None:
    for suite, mode, line in all_lines():
        assert line.verdict != OPEN, (suite, mode, line)
        assert line.because[0].isupper() and line.because.endswith("."), line.because
        assert re.compile(line.meets).pattern, line.because


def test_the_counts_are_those_of_the_tables_lines() -> None:
    assert TABLE["counts"].keys() == TABLE["suites"].keys()
    for suite, modes in TABLE["counts"].items():
        assert modes.keys() == TABLE["suites"][suite].keys()
        for mode, count in modes.items():
            explained = sum(len(line.tests) for line in results.lines_of(TABLE, suite, mode))
            assert explained == count[BY_DESIGN] == count["own"] - count["ours"], (suite, mode)
            assert mode != "mechanics" or explained <= (15 if suite == "transformers" else 6)


def test_the_page_shows_the_table() -> None:
    shown = page.PAGE.read_text()
    assert shown == page.filled(shown, TABLE)
    assert all(line.because in shown for _, _, line in all_lines())


def test_a_table_with_a_test_twice_is_refused() -> None:
    entry: dict[str, Any] = {"verdict": BY_DESIGN, "because": "So.", "meets": "x", "tests": ["test_a.T::test_x"]}
    with pytest.raises(ValueError, match="twice"):
        results.lines_of({"suites": {"s": {"mechanics": [entry, entry]}}}, "s", "mechanics")
