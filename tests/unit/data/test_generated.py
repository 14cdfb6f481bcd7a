"""Generated tasks: distant seeds, no evaluation question in training, everything reproducible."""

from __future__ import annotations

import sys
from itertools import islice

import pytest

from sbft.data import generated
from sbft.data.sources import load_source, load_splits
from sbft.errors import DataError, MissingPackageError

pytest.importorskip("reasoning_gym")

SUM = "generated:chain_sum"
FEW = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 200 different sums at most


def test_same_arguments_same_rows() -> None:
    first, again = (list(islice(generated.rows(SUM, part="train", seed=4), 300)) for _ in range(2))
    assert first == again
    assert set(first[0]) == {"prompt", "completion"} and all(isinstance(row["completion"], str) for row in first)
    question = first[0]["prompt"].partition(":")[2].strip(" =")
    assert first[0]["completion"] == str(eval(question))


def test_rows_past_one_batch_go_on_without_repeating_it() -> None:
    prompts = [row["prompt"] for row in islice(generated.rows(SUM, part="train"), 600)]
    assert len(set(prompts)) > 550  # a restart at the same seed would leave 256


def test_neighbouring_seeds_and_parts_share_no_stretch() -> None:
    # Seed s + i makes question i: with neighbouring seeds, nearly all questions would be shared.
    drawn = [
        {row["prompt"] for row in islice(generated.rows(SUM, part=part, seed=seed), 200)}
        for seed in (0, 1)
        for part in ("train", "validation", "eval")
    ]
    shared = [len(a & b) for i, a in enumerate(drawn) for b in drawn[:i]]
    assert max(shared) < 20


def test_overlap_is_dropped_counted_and_replaced() -> None:
    splits = load_splits(train=SUM, train_size=150, validation_size=20, eval_size=40, options=FEW)
    assert splits.validation is not None and splits.eval is not None
    assert (splits.train.num_rows, splits.validation.num_rows, splits.eval.num_rows) == (150, 20, 40)
    train, validation, test = (set(part["prompt"]) for part in (splits.train, splits.validation, splits.eval))
    assert not train & test and not train & validation and not validation & test
    assert splits.dropped_overlap > 0
    with_overlap = load_splits(train=SUM, train_size=150, eval_size=40, options=FEW, allow_overlap=True)
    assert with_overlap.dropped_overlap == 0 and set(with_overlap.train["prompt"]) & set(with_overlap.eval["prompt"])


def test_a_task_without_enough_questions_is_refused() -> None:
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "allow_negation": False}
    with pytest.raises(DataError, match="too few different questions"):
        load_splits(train=SUM, train_size=50, eval_size=5_000, options=tiny)


def test_load_source_of_a_part_matches_the_splits() -> None:
    splits = load_splits(train=SUM, train_size=5, eval_size=7, seed=2)
    assert splits.eval is not None
    assert load_source(SUM, split="eval", size=7, seed=2).to_list() == splits.eval.to_list()


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("generated:chain_sums", {}, "no task 'chain_sums'.*generated:chain_sum"),
        (SUM, {"digits": 3}, "no option 'digits'; it has .*min_digits"),
        (SUM, {"min_terms": 9, "max_terms": 2}, "refuses its options"),
        ("generated:rubiks_cube", {}, "no single right answer"),
    ],
)
def test_wrong_tasks_and_options(source: str, options: dict, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        load_source(source, size=2, options=options)


def test_a_size_is_needed() -> None:
    with pytest.raises(DataError, match="train_size"):
        load_splits(train=SUM, eval_size=3)


def test_missing_package_gives_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingPackageError, match=r"scripts/setup\.sh"):
        load_source(SUM, size=1)


def test_naming_the_same_task_for_evaluation_changes_nothing() -> None:
    implied = load_splits(train=SUM, train_size=100, eval_size=20, options=FEW)
    named = load_splits(train=SUM, eval=SUM, train_size=100, eval_size=20, options=FEW)
    assert named.train.to_list() == implied.train.to_list() and named.dropped_overlap == implied.dropped_overlap
    with pytest.raises(DataError, match="eval data generated:chain_sum is generated without end.*data.eval_size"):
        load_splits(train=SUM, eval=SUM, train_size=100)
