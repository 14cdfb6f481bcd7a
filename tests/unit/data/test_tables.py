"""Tables that outgrow memory: the same rows from a file, a few at a time, and no files left behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sbft.data import files, tables
from sbft.data.files import read_file
from sbft.data.format import format_dataset
from sbft.data.tables import GrowingTable, dataset_of, pieces
from sbft.errors import DataError
from tests.tiny import tiny_tokenizer


@pytest.fixture
def spilling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes every table of more than a few bytes go to a file; returns the folder of these files."""
    monkeypatch.setattr(tables, "IN_MEMORY_BYTES", 16)
    monkeypatch.setattr(tables, "_BATCH_BYTES", 64)
    monkeypatch.setenv("SBFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_table_in_a_file_is_the_table(spilling: Path) -> None:
    parts = [pa.table({"ids": [[n] * (n % 5), [n]], "text": [str(n), None]}) for n in range(50)]
    grown = GrowingTable()
    for part in parts:
        grown.add(part)
    whole = grown.finish()
    assert whole is not None and whole.equals(pa.concat_tables(parts))
    assert list(spilling.iterdir()) == []
    data = dataset_of(whole)
    assert data[60]["ids"] == [30] * 0 and data[99] == {"ids": [49], "text": None}


def test_nothing_added_is_no_table() -> None:
    assert GrowingTable().finish() is None


def test_a_folder_that_cannot_be_written_is_named(spilling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spilling.write_text("a file in its place")
    grown = GrowingTable()
    with pytest.raises(DataError, match=r"cache, which cannot be written: .*set SBFT_CACHE"):
        grown.add(pa.table({"text": ["x" * 100]}))


def test_pieces_are_as_many_rows_as_a_piece_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_PIECE_BYTES", 4_000)
    lengths = [1] * 1_500 + [2_000] * 7 + [50_000] + [1] * 3
    data = dataset_of(pa.table({"text": ["x" * length for length in lengths], "unused": range(len(lengths))}))
    seen = []
    for piece in pieces(data, ["text"]):
        assert list(piece) == ["text"] and len(piece["text"]) <= 1_000
        assert len(piece["text"]) == 1 or sum(map(len, piece["text"])) <= 4_000
        seen += piece["text"]
    assert list(map(len, seen)) == lengths


ROWS = [
    {"prompt": "one", "completion": "1"},
    {"prompt": "two", "completion": 2, "extra": {"a": 1}},
    {"prompt": "three", "completion": None, "extra": {"b": "x"}},
    {"prompt": None, "completion": True},
]


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_rows_are_the_same_in_however_many_chunks_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Later rows have a different type of value, another column, or another key of a struct."""
    monkeypatch.setattr(files, "_ROWS", at_once)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_file(path).to_list() == [
        {"prompt": "one", "completion": "1", "extra": None},
        {"prompt": "two", "completion": "2", "extra": {"a": 1, "b": None}},
        {"prompt": "three", "completion": None, "extra": {"a": None, "b": "x"}},
        {"prompt": None, "completion": "true", "extra": None},
    ]


@pytest.mark.parametrize("at_once", [1, 100])
def test_values_of_different_kinds_are_refused_in_however_many_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(files, "_ROWS", at_once)
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": "text"}\n{"messages": [{"role": "user"}]}\n')
    with pytest.raises(DataError, match="'messages' in .* are not all of one kind"):
        read_file(path)


def test_examples_and_their_counts_are_the_same_from_a_file(spilling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.random.default_rng(0).integers(0, 90, size=120)
    texts = ["fox " * int(count) for count in words]
    for packing in (False, True):
        monkeypatch.setattr(tables, "IN_MEMORY_BYTES", 1 << 30)
        held, expected = format_dataset(
            dataset_of(pa.table({"text": texts})), tiny_tokenizer(), max_length=64, packing=packing
        )
        monkeypatch.setattr(tables, "IN_MEMORY_BYTES", 16)
        mapped, report = format_dataset(
            dataset_of(pa.table({"text": texts})), tiny_tokenizer(), max_length=64, packing=packing
        )
        assert mapped.to_list() == held.to_list() and report == expected
        # By hand: the tokens of a text and the end token; those beyond 64 are cut, and empty texts are left out.
        kept = [len(tiny_tokenizer()(text)["input_ids"]) + 1 for text in texts if text]
        assert report.examples == len(kept) and report.empty == len(texts) - len(kept)
        assert report.tokens == sum(min(length, 64) for length in kept)
        assert report.truncated == sum(length > 64 for length in kept) > 0
        assert sum(map(len, mapped["input_ids"])) == report.tokens


def test_one_token_and_two_hundred_thousand(tmp_path: Path) -> None:
    """Also rows that are too long for Python's CSV reader. From a row of one token, only its end is learned."""
    long = "fox," * 100_000
    for name, text in {
        "a.jsonl": json.dumps({"prompt": "a", "completion": "b"})
        + "\n"
        + json.dumps({"prompt": long, "completion": "b"}),
        "a.csv": f'prompt,completion\na,b\n"{long}",b\n',
    }.items():
        path = tmp_path / name
        path.write_text(text + "\n")
        _, report = format_dataset(read_file(path), tiny_tokenizer(None), max_length=1_000_000)
        assert report.examples == 2 and report.tokens == 3 + report.longest and report.longest > 200_000
        _, cut = format_dataset(read_file(path), tiny_tokenizer(None), max_length=1_000)
        assert (cut.examples, cut.dropped, cut.tokens) == (1, 1, 3)
    (tmp_path / "a.txt").write_text("a\n")
    _, report = format_dataset(read_file(tmp_path / "a.txt"), tiny_tokenizer())
    assert (report.examples, report.tokens, report.completion_tokens) == (1, 2, 1)
