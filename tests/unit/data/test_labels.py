"""The classes of a column as words that a model writes, also where values are missing."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from sbft.data.sources import load_source

NAMES = {"0": "negative", "1": "positive"}


def test_whole_numbers_of_a_table_with_gaps_stay_whole(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", "b", "c"], "label": pa.array([1.0, None, 0.0])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert load_source(str(tmp_path / "a.parquet"), completion="label")["label"] == ["1", None, "0"]


def test_numbers_with_a_fraction_keep_it(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", "b", "c"], "label": pa.array([1.0, None, 0.5])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert load_source(str(tmp_path / "a.parquet"), completion="label")["label"] == ["1.0", None, "0.5"]


def test_an_empty_cell_of_a_csv_file_is_a_missing_label(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,label\na,neg\nb,\nc,pos\n")
    names = {"neg": "negative", "pos": "positive"}
    rows = load_source(str(tmp_path / "a.csv"), completion="label", label_names=names)
    assert rows["label"] == ["negative", None, "positive"]
