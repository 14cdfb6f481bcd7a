"""Malformed recipes and data files, drawn at random: exit code 2 and a sentence, never a traceback."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzzing import Case, complaint, data_files, recipes

# Every run draws the same examples; tests/faults/fuzz.py draws others, and shrinks those that fail.
drawn = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@drawn
@given(case=recipes())
def test_malformed_recipes(tiny_dir: Path, case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert complaint(case, Path(folder), tiny_dir) is None


@drawn
@given(case=data_files())
def test_malformed_data_files(tiny_dir: Path, case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert complaint(case, Path(folder), tiny_dir) is None
