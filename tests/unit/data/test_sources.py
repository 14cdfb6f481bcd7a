"""Local files, splits without leaks, and the error messages for bad data."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sbft.data.sources import load_source, load_splits
from sbft.errors import DataError

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(40)]


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_each_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    csv = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)
    (tmp_path / "a.csv").write_text(csv, encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for ending in ("jsonl", "json", "csv", "parquet"):
        assert load_source(str(tmp_path / f"a.{ending}")).to_list() == ROWS


def test_text_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\nstill one\n\n\n  \ntwo\r\n\r\nthree\n", encoding="utf-8")
    assert load_source(str(path))["text"] == ["one\nstill one", "two", "three"]


def test_csv_values_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"a, b",007\n', encoding="utf-8")
    assert load_source(str(path)).to_list() == [{"prompt": "a, b", "completion": "007"}]


def test_numbers_among_texts_become_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": 42}, {"prompt": "b", "completion": "x"}])
    assert load_source(path)["completion"] == ["42", "x"]


def test_keys_that_only_later_rows_have_are_kept(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b", "completion": "x"}])
    assert load_source(path)["completion"] == [None, "x"]


@pytest.mark.parametrize(
    ("name", "contents", "expected"),
    [
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', r"Line 3 of .*a\.jsonl is not valid JSON"),
        ("a.jsonl", "[1, 2]\n", r"Line 1 of .* holds a list"),
        ("a.jsonl", "", "empty"),
        ("a.jsonl", "\n \n", "empty"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}\n', r"named \.jsonl"),
        ("a.json", '{"prompt": "a"}', "not hold a list of objects"),
        ("a.json", "", "empty"),
        ("a.csv", "prompt,completion\n", "empty"),
        ("a.csv", "prompt,completion\na,b,c\n", r"Line 2 of .* values"),
        ("a.csv", "prompt,completion\na\n", r"Line 2 of .* values"),
        ("a.csv", 'prompt,completion\na,b\n"a\nb",c\na,"b\nc,d\ne,f\n', r"Line 5 of .* not valid CSV.*is closed"),
        ("a.txt", "\n\n", "empty"),
        ("a.parquet", "no parquet", "not a readable Parquet"),
        ("a.xlsx", "x", r"ends in \.xlsx"),
        ("a.jsonl", '{"messages": 1}\n{"messages": [1]}\n', "'messages' .* not all of one kind"),
        ("a.jsonl", "{}\n{}\n", "empty"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "cut \\ud83d"}\n', r"Line 2 of .* half of a character"),
        ("a.json", '[{"\\udc00": 1}]', "half of a character"),
        ("a.jsonl", '{"prompt": ' + "[" * 100_000, "Line 1 of .* nested too deep"),
        ("a.jsonl", '{"prompt": ' + "9" * 5_000 + "}", "Line 1 of .* too many digits"),
        ("a.json", "[" * 100_000, "nested too deep"),
        ("a.csv", "prompt,prompt\na,b\n", "names the column 'prompt' twice"),
    ],
)
def test_malformed_files_are_refused_with_the_place(tmp_path: Path, name: str, contents: str, expected: str) -> None:
    (tmp_path / name).write_text(contents, encoding="utf-8")
    with pytest.raises(DataError, match=expected):
        load_source(str(tmp_path / name))


def test_numbers_that_no_table_holds_are_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": 1}, {"prompt": 10**30}, {"prompt": None}])
    assert load_source(path)["prompt"] == ["1", str(10**30), None]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns called 'text'"):
        load_source(str(tmp_path / "a.parquet"))


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "there.jsonl", ROWS)
    with pytest.raises(DataError, match=r"There is no file .*absent\.jsonl.*there\.jsonl"):
        load_source(str(tmp_path / "absent.jsonl"))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        load_source(str(tmp_path / "a.jsonl"))


def test_hub_id_without_a_hub_says_so() -> None:
    with pytest.raises(DataError, match="nobody/nothing.*HF_HUB_OFFLINE"):
        load_source("nobody/nothing", split="train")


def test_saved_data_set_loads_by_split(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_list(ROWS[:30]), test=Dataset.from_list(ROWS[30:])).save_to_disk(str(tmp_path / "d"))
    assert load_source(str(tmp_path / "d"), split="test").to_list() == ROWS[30:]
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        load_source(str(tmp_path / "d"), split="dev")


def test_size_is_a_seeded_choice_in_order(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    chosen = load_source(path, size=10, seed=1)["prompt"]
    order = [row["prompt"] for row in ROWS]
    assert len(chosen) == 10
    assert chosen == sorted(chosen, key=order.index)
    assert chosen == load_source(path, size=10, seed=1)["prompt"] != load_source(path, size=10, seed=2)["prompt"]
    assert set(chosen) != set(order[:10])


def test_shared_questions_are_refused_unless_allowed(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ROWS)
    test = write_jsonl(tmp_path / "test.jsonl", [{"prompt": " Question  7 ", "completion": "other"}, *ROWS[3:4]])
    with pytest.raises(DataError, match="shares 2 questions .*'question 7'.*data.allow_overlap: true"):
        load_splits(train=train, eval=test)
    allowed = load_splits(train=train, eval=test, allow_overlap=True)
    assert allowed.eval is not None and allowed.eval.num_rows == 2 and allowed.train.num_rows == 40


def test_a_validation_part_that_is_tested_on_is_refused_unless_allowed(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ROWS[:30])
    first, second = write_jsonl(tmp_path / "a.jsonl", ROWS[30:36]), write_jsonl(tmp_path / "b.jsonl", ROWS[35:])
    with pytest.raises(
        DataError, match=r"shares 1 question \(the first: 'question 35'\) .* chosen on the data that it"
    ):
        load_splits(train=train, validation=first, eval=second)
    # One file for both is refused even if different rows happen to be taken from it.
    for size in (None, 1):
        with pytest.raises(DataError, match=r"are both .*b\.jsonl.*chosen on the data that it is then tested on"):
            load_splits(train=train, validation=second, eval=second, validation_size=size, eval_size=5)
    allowed = load_splits(train=train, validation=second, eval=second, allow_overlap=True)
    assert allowed.validation is not None and allowed.eval is not None
    assert allowed.validation.to_list() == allowed.eval.to_list() == ROWS[35:]


def test_splits_of_one_data_set_are_different_data(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    parts = {"train": ROWS[:20], "validation": ROWS[20:30], "test": ROWS[30:]}
    source = str(tmp_path / "saved")
    DatasetDict({name: Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(source)
    splits = load_splits(train=source, validation=source, eval=source)
    assert splits.validation is not None and splits.validation.to_list() == ROWS[20:30]
    with pytest.raises(DataError, match="a source or split of its own"):
        load_splits(train=source, validation=source, eval=source, validation_split="test")


def test_shared_conversations_are_refused(tmp_path: Path) -> None:
    def chat(question: str, answer: str) -> dict:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    train = write_jsonl(tmp_path / "train.jsonl", [chat("a", "1"), chat("b", "2")])
    test = write_jsonl(tmp_path / "test.jsonl", [chat("b", "3")])
    with pytest.raises(DataError, match="shares 1 question"):
        load_splits(train=train, eval=test)


def test_renamed_question_column_is_compared(tmp_path: Path) -> None:
    rows = [{"q": row["prompt"], "completion": "x"} for row in ROWS]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    test = write_jsonl(tmp_path / "test.jsonl", rows[:1])
    with pytest.raises(DataError, match="shares 1 question"):
        load_splits(train=train, eval=test, prompt="q")


def test_validation_is_split_off_without_leaving_copies(tmp_path: Path) -> None:
    doubled = [*ROWS, *[{"prompt": row["prompt"].upper(), "completion": "again"} for row in ROWS]]
    train = write_jsonl(tmp_path / "train.jsonl", doubled)
    splits = load_splits(train=train, validation_size=8, seed=3)
    assert splits.validation is not None and splits.validation.num_rows == 8 and splits.eval is None
    held = {question.lower() for question in splits.validation["prompt"]}
    assert not held & {question.lower() for question in splits.train["prompt"]}
    assert splits.dropped_overlap == 80 - 8 - splits.train.num_rows > 0
    assert load_splits(train=train, validation_size=8, seed=3).validation["prompt"] == splits.validation["prompt"]


def test_nothing_left_after_splitting_off_is_refused(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ROWS[:5])
    with pytest.raises(DataError, match="has 5 rows, so 5 cannot"):
        load_splits(train=train, validation_size=5)
    same = write_jsonl(tmp_path / "same.jsonl", ROWS[:1] * 5)
    with pytest.raises(DataError, match="No training row is left"):
        load_splits(train=same, eval_size=2)


def test_sizes_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train_size is 0"):
        load_splits(train=write_jsonl(tmp_path / "a.jsonl", ROWS), train_size=0)


def test_malformed_conversations_are_left_to_be_refused_by_name(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"messages": ["hello"]}])
    test = write_jsonl(tmp_path / "test.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    assert load_splits(train=train, eval=test).train.num_rows == 1


NAMES = {"0": "negative", "1": "positive"}


def labelled(tmp_path: Path, values: list, ending: str) -> str:
    """Write a file with questions and a column of labels."""
    rows = [{"prompt": f"question {i}", "label": value} for i, value in enumerate(values)]
    path = tmp_path / f"labelled.{ending}"
    if ending == "jsonl":
        return write_jsonl(path, rows)
    if ending == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif ending == "csv":
        lines = [f"{row['prompt']},{'' if row['label'] is None else row['label']}\n" for row in rows]
        path.write_text("prompt,label\n" + "".join(lines), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_labels_get_their_names_from_any_file(tmp_path: Path, ending: str) -> None:
    source = labelled(tmp_path, [0, 1, 1, 0], ending)
    assert load_source(source, completion="label")["label"] == ["0", "1", "1", "0"]
    rows = load_source(source, completion="label", label_names=NAMES)
    assert rows["label"] == ["negative", "positive", "positive", "negative"]
    assert rows.column_names == ["prompt", "label"]
    with pytest.raises(DataError, match=r"'label' of .*labelled.* holds 1, which data.label_names does not name.*'1'"):
        load_source(source, completion="label", label_names={"0": "negative", "2": "neutral"})


@pytest.mark.parametrize(
    ("values", "names", "expected"),
    [
        ([1.0, None, 0.0], NAMES, ["positive", None, "negative"]),
        ([0.5, 2.0], None, ["0.5", "2.0"]),
        ([0.5, 2.0], {"0.5": "half", "2": "two"}, ["half", "two"]),
        ([True, False], None, ["true", "false"]),
        ([True, False], {"True": "yes", "false": "no"}, ["yes", "no"]),
        ([-1, 12], {"-1": "bad", "12": "good"}, ["bad", "good"]),
        (["neg", "pos"], {"neg": "negative", "pos": "positive"}, ["negative", "positive"]),
        (["neg", "pos", None], None, ["neg", "pos", None]),
        ([0, "x"], {"0": "zero", "x": "ex"}, ["zero", "ex"]),
        ([None, None], NAMES, [None, None]),
    ],
)
def test_labels_of_each_kind(tmp_path: Path, values: list, names: dict | None, expected: list) -> None:
    assert load_source(labelled(tmp_path, values, "jsonl"), completion="label", label_names=names)["label"] == expected


def test_missing_numbers_of_a_table_are_missing_labels(tmp_path: Path) -> None:
    source = labelled(tmp_path, [0.0, float("nan"), 1.0], "parquet")
    assert load_source(source, completion="label", label_names=NAMES)["label"] == ["negative", None, "positive"]


def test_classes_of_a_data_set_bring_their_names(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"prompt": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    data = Dataset.from_dict({"prompt": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    for source in (str(tmp_path / "a.parquet"), str(tmp_path / "saved")):
        assert load_source(source, completion="label")["label"] == ["pos", "neg", None]
        by_number = load_source(source, completion="label", label_names=NAMES)
        by_name = load_source(source, completion="label", label_names={"neg": "negative", "pos": "positive"})
        assert by_number["label"] == by_name["label"] == ["positive", "negative", None]
        with pytest.raises(DataError, match=r"holds 1 \(pos\), which data.label_names does not name"):
            load_source(source, completion="label", label_names={"0": "negative"})


def test_names_for_no_column_or_no_single_values_are_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answers": ["x"]}])
    assert load_source(source)["prompt"] == ["a"]
    assert load_source(source, completion="answers")["answers"] == [["x"]]
    with pytest.raises(DataError, match="column 'completion', which .* it has 'prompt', 'answers'.*data.completion"):
        load_source(source, label_names=NAMES)
    with pytest.raises(DataError, match="'answers' of .* is of the type List"):
        load_source(source, completion="answers", label_names=NAMES)


def test_every_part_of_a_split_is_named(tmp_path: Path) -> None:
    train = labelled(tmp_path, [0, 1] * 10, "jsonl")
    test = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "x", "label": 1}])
    splits = load_splits(train=train, eval=test, validation_size=4, completion="label", label_names=NAMES)
    assert splits.eval is not None and splits.eval["label"] == ["positive"]
    assert splits.validation is not None
    assert {*splits.train["label"], *splits.validation["label"]} == {"negative", "positive"}
