"""The loss without logits for a head on a grid: as for a bfloat16 head, and the head is never dense as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbft.grid import buffer
from sbft.training.loss import cross_entropy
from sbft.training.loss.cross_entropy import linear_cross_entropy
from sbft.training.loss.head_trial import find_head
from sbft.training.loss.tied_embeddings import TiedEmbedding
from tests.unit.grid.cases import FORMATS, dense_copy, grid_model, pair, tokens

VOCABULARY, HIDDEN = 1000, 64


def loss_and_gradients(weight: Tensor, rows: int, **settings: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, HIDDEN, generator=generator).bfloat16().requires_grad_()
    labels = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    bias = torch.randn(VOCABULARY, generator=generator).bfloat16().requires_grad_()
    weight.grad = None
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, **settings)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None and bias.grad is not None
    assert type(weight.grad) is Tensor
    return [loss.detach(), hidden.grad, weight.grad, bias.grad]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("weight_elements", [HIDDEN * 300, HIDDEN * VOCABULARY])
@pytest.mark.parametrize("piece_elements", [2**24, 2**9])
@pytest.mark.parametrize("settings", [{}, {"scale": 0.5, "softcap": 30.0}])
def test_equals_bfloat16(
    form: str, rows: int, weight_elements: int, piece_elements: int, settings: dict[str, Any]
) -> None:
    weight, plain = pair((VOCABULARY, HIDDEN), form)
    settings = {**settings, "weight_elements": weight_elements, "piece_elements": piece_elements}
    ours, theirs = (loss_and_gradients(one, rows, **settings) for one in (weight, plain))
    assert all(torch.equal(*both) for both in zip(ours, theirs, strict=True))


def test_pieces_of_the_head_change_the_hidden_gradient_alone_and_by_roundings() -> None:
    weight, plain = pair((VOCABULARY, HIDDEN))
    loss, hidden, *rest = loss_and_gradients(weight, 40, weight_elements=HIDDEN * 300)
    whole_loss, whole_hidden, *whole_rest = loss_and_gradients(plain, 40)
    assert torch.equal(loss, whole_loss) and all(torch.equal(*both) for both in zip(rest, whole_rest, strict=True))
    # Each of four products, and their sum, is rounded once to bfloat16.
    assert (hidden - whole_hidden).abs().max() <= 5 * 2**-8 * whole_hidden.abs().max()


@pytest.mark.parametrize("piece_elements", [2**24, 2**9])
def test_a_piece_of_the_head_is_dense_at_a_time(piece_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer, "_kept", [])
    monkeypatch.setattr(cross_entropy, "DENSE_ELEMENTS", HIDDEN * 128)
    weight, _ = pair((VOCABULARY, HIDDEN))
    loss_and_gradients(weight, 8, piece_elements=piece_elements)
    assert [one.numel() for one in buffer._kept] == [HIDDEN * 128]


@pytest.mark.parametrize("kind", ["llama", "llama tied", "gemma3", "gpt2"])
def test_a_models_head_is_found_and_gives_its_loss(kind: str) -> None:
    model = grid_model(kind).train()
    plain = dense_copy(model)
    results = []
    for one in (model, plain):
        head = find_head(one)
        ids = tokens()
        torch.manual_seed(0)  # for dropout
        with TiedEmbedding(one, head) as tied:
            loss = head.loss(one, {"input_ids": ids, "labels": ids}, weight=tied.head_weight())
            loss.backward()
        results.append((loss.detach(), [p.grad for p in one.parameters()]))
    (loss, gradients), (expected_loss, expected) = results
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(*both) for both in zip(gradients, expected, strict=True))


def test_a_tied_head_on_a_grid_gets_one_table_of_gradients() -> None:
    model: Any = grid_model("llama tied").train()
    embedding: nn.Embedding = model.get_input_embeddings()
    seen: list[bool] = []
    with TiedEmbedding(model, find_head(model)) as tied:
        assert embedding.sparse
        weight = tied.head_weight()
        assert weight is not embedding.weight
        ids = tokens()
        hidden = F.embedding(ids, embedding.weight, sparse=True)[0]
        linear_cross_entropy(hidden, weight, ids[0]).backward()
        seen.append(embedding.weight.grad is not None and not embedding.weight.grad.is_sparse)
    assert seen == [True]
