"""Batches and packing: padding has no effect, and packed documents do not see one another."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from sbft.data.collate import Collator, left_pad
from sbft.data.format import format_dataset
from sbft.data.packing import _best_fit
from tests.tiny import KINDS, tiny_model, tiny_tokenizer

ROWS = [{"prompt": "What is " + "the fox " * n, "completion": f"The answer is {n}."} for n in (1, 9, 3, 2, 6, 4)]


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten(), reduction="sum")


def test_padding_on_the_right() -> None:
    batch = Collator(9, pad_to_multiple_of=1)(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [-100]}]
    )
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 9, 9]],
        "labels": [[-100, 2, 3], [-100, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }


def test_padding_on_the_left() -> None:
    batch = left_pad([[1, 2, 3], [4]], 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


@given(st.lists(st.integers(1, 16), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_packing_keeps_every_example_once_within_the_capacity(lengths: list[int]) -> None:
    import numpy as np

    order, rows = _best_fit(np.array(lengths), 16)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert (np.diff(rows) >= 0).all() and set(rows.tolist()) == set(range(rows[-1] + 1))
    loads = np.bincount(rows, weights=np.array(lengths)[order]).tolist()
    assert max(loads) <= 16
    # No two rows would have fitted into one.
    assert len(loads) < 2 or sum(sorted(loads)[:2]) > 16


def test_packed_rows_hold_whole_examples_with_their_own_positions() -> None:
    tokenizer = tiny_tokenizer()
    plain, report = format_dataset(Dataset.from_list(ROWS), tokenizer, max_length=96)
    packed, packed_report = format_dataset(Dataset.from_list(ROWS), tokenizer, max_length=96, packing=True)
    assert packed_report.packed_into == packed.num_rows < plain.num_rows
    assert (packed_report.examples, packed_report.tokens) == (report.examples, report.tokens)
    documents = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= 96
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            documents.append({name: row[name][start:end] for name in ("input_ids", "labels")})
    assert sorted(documents, key=str) == sorted(plain.to_list(), key=str)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_do_not_see_one_another(kind: str, attention: str) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(kind, dtype=torch.float32, attn_implementation=attention)
    plain, _ = format_dataset(Dataset.from_list(ROWS), tokenizer, max_length=100)
    packed, _ = format_dataset(Dataset.from_list(ROWS), tokenizer, max_length=100, packing=True)
    assert any(row["position_ids"].count(0) > 1 for row in packed)
    collate = Collator(tokenizer.pad_token_id)
    with torch.no_grad():
        alone = torch.zeros((), dtype=torch.float64)
        for row in plain:
            batch = collate([row])
            alone += summed_loss(model(**{**batch, "labels": None}, use_cache=False).logits, batch["labels"])
        # Rows of unequal length in one batch, so that there is padding, too.
        batch = collate(list(packed))
        assert "attention_mask" not in batch
        together = summed_loss(model(**{**batch, "labels": None}, use_cache=False).logits, batch["labels"])
    assert len(packed) > 1 and len({len(row["input_ids"]) for row in packed}) > 1
    # float32 arithmetic in a different order: a relative error of about 2**-24 in each of some hundred sums.
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    with torch.no_grad():  # control: with documents that see one another, the loss is different
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        mixed = summed_loss(model(**{**batch, "labels": None}, use_cache=False).logits, batch["labels"])
    assert abs(mixed.item() / alone.item() - 1) > 1e-4


def test_lengths_are_rounded_up_so_that_there_are_few_of_them():
    batch = Collator(9)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3] + [9] * 13]
    assert batch["labels"].tolist() == [[-100, 2, 3] + [-100] * 13]
    assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * 13]
    assert Collator(9)([{"input_ids": [1] * 16, "labels": [1] * 16}])["input_ids"].shape == (1, 16)


def test_packed_examples_keep_their_length():
    batch = Collator(9)([{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "position_ids": [0, 0, 1]}])
    assert batch["position_ids"].tolist() == [[0, 0, 1]]
