"""Cross entropy of a head whose vocabulary is split over several ranks, against float64 with all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sbft.training.loss.cross_entropy import VocabularyPart, linear_cross_entropy
from sbft.training.loss.token_statistics import TokenStatistics
from tests.unit.optim.test_sharding import Ranks, pieces


@pytest.mark.parametrize("piece_elements", [2**20, 700])
@pytest.mark.parametrize(("scale", "softcap", "biased"), [(1.0, None, False), (0.5, 3.0, True)])
def test_ranks_together_have_the_loss_and_the_gradients_of_the_whole_head(
    scale: float, softcap: float | None, biased: bool, piece_elements: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 12, generator=generator), torch.randn(1001, 12, generator=generator)
    bias = torch.randn(1001, generator=generator) if biased else None
    # The first and the last token of each rank, among others.
    labels = torch.tensor([0, 333, 334, 667, 668, 1000, 5])
    labels[6] = F.linear(hidden, weight, bias)[6].argmax()  # a correct prediction
    statistics = [TokenStatistics() for _ in range(3)]
    whole = [one.double().requires_grad_() for one in (hidden, weight, *([bias] if bias is not None else []))]
    logits = F.linear(whole[0], whole[1], whole[2] if biased else None) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, labels, reduction="sum") / 5
    expected.backward()

    ranks = Ranks(3)
    cuts = pieces(1001, 3)

    def work(rank: int) -> Any:
        def gather(message: Tensor) -> Tensor:
            one_hot = torch.zeros(len(message), 3, message.shape[1])
            one_hot[:, rank] = message
            ranks.all_reduce(rank)(one_hot)
            return one_hot

        part = VocabularyPart(cuts[rank].start, gather, ranks.all_reduce(rank))
        its = [one.clone().requires_grad_() for one in (hidden, weight[cuts[rank]])]
        its_bias = None if bias is None else bias[cuts[rank]].clone().requires_grad_()
        loss = linear_cross_entropy(
            its[0], its[1], labels, bias=its_bias, num_items=5.0, scale=scale, softcap=softcap,
            piece_elements=piece_elements, part=part, statistics=statistics[rank],
        )  # fmt: skip
        loss.backward()
        return loss.detach(), its[0].grad, its[1].grad, None if its_bias is None else its_bias.grad

    found = ranks.run(work)
    probabilities = logits.detach().softmax(1)
    entropy = -(probabilities * probabilities.log()).sum()
    for rank, (loss, of_hidden, of_weight, of_bias) in enumerate(found):
        correct = int((logits.argmax(1) == labels).sum())
        assert statistics[rank].row().tolist() == [correct, pytest.approx(float(entropy), rel=1e-5), 7.0]
        assert torch.equal(loss, found[0][0]) and torch.equal(of_hidden, found[0][1])
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
        for gradient, all_of_it in ((of_hidden, whole[0].grad), (of_weight, whole[1].grad[cuts[rank]])):
            torch.testing.assert_close(gradient.double(), all_of_it, rtol=1e-4, atol=1e-6)
        if of_bias is not None:
            torch.testing.assert_close(of_bias.double(), whole[2].grad[cuts[rank]], rtol=1e-4, atol=1e-6)
