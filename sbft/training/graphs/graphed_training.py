"""The trainer's part of CUDA graphs: which batches a graph can run, and how they are padded to few shapes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, masking_utils

from sbft.data.collate import IGNORED_LABEL
from sbft.evaluation.likelihood import evaluating
from sbft.optim.base import TokenOptimizer
from sbft.training.arguments import ArgumentError
from sbft.training.batches.batch_counts import CountedBatch, Counts, counts_of
from sbft.training.graphs.cuda_graph import GraphedSteps
from sbft.training.loss.head import Head
from sbft.training.loss.sft_metrics import SftMetrics
from sbft.training.loss.token_statistics import TokenStatistics
from sbft.training.peft_models import unwrap

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

_SMALLEST_STEP = 16


class GraphedTraining(_Base):
    """Put behind `LogitsFreeLoss` and before a `Trainer`: runs steps as graphs while `_graphed` is set."""

    args: Any
    model: Any
    model_wrapped: Any
    _has_own_loss: Callable[[], bool]
    _metrics_of_sft: Callable[[], SftMetrics | None]
    _is_overridden: Callable[[str], bool]
    _graphed: GraphedSteps | None = None
    _is_causal = False
    _most_positions: int | None = None
    _warned_of_plain_step = False
    _whole_length: int | None = None
    _statistics_row: Tensor | None = None

    def _start_graphs(self, optimizer: TokenOptimizer, head: Head | None) -> None:
        """Run steps as graphs from now on.

        Raises:
            ArgumentError: if the steps of this training cannot be captured.
        """
        reason = self._why_not_graphed(head)
        if head is None or reason is not None:
            raise ArgumentError(f"cuda_graphs=True does not work with this training: {reason}. Set cuda_graphs=False.")

        # Each graph writes the metrics that TRL logs of its step here.
        self._statistics_row = row = None if self._metrics_of_sft() is None else torch.zeros(3, device=self.args.device)

        def loss_of(batch: dict[str, Any]) -> Tensor:
            inputs = dict(batch)
            num_items, labelled = inputs.pop("num_items"), inputs.pop("all_labelled")
            statistics = None if row is None else TokenStatistics()
            with one_example_a_row():
                loss = head.loss(
                    self.model_wrapped,
                    inputs,
                    num_items,
                    every_position=True,
                    all_labelled=labelled,
                    statistics=statistics,
                )
            if row is not None and statistics is not None:
                row.copy_(statistics.row())
            return loss

        try:
            self._graphed = GraphedSteps(optimizer, loss_of)
        except ValueError as error:
            raise ArgumentError(f"cuda_graphs=True: {error}.") from error
        self._is_causal = is_causal(self.model, head)
        base: Any = unwrap(self.model)
        self._most_positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        self._whole_length = None

    def _why_not_graphed(self, head: Head | None) -> str | None:
        """What in this training cannot be captured, or would be left out; None if nothing."""
        reasons = {
            "it has another loss (label_smoothing_factor, compute_loss_func, or your own compute_loss)": (
                self._has_own_loss() or self._is_overridden("compute_loss")
            ),
            "its loss is made from logits (of a model whose head is not a plain linear one, by Liger, or by TRL)": head is None,
            "it runs in several processes": self.accelerator.num_processes > 1,
            "it computes under autocast (mixed_precision of accelerate's launch config)": (
                self.accelerator.mixed_precision != "no"
            ),
            "gradient checkpointing was enabled on the model": any(
                vars(module).get("gradient_checkpointing") for module in self.model.modules()
            ),
        }
        return next((reason for reason, is_so in reasons.items() if is_so), None)

    def _graphed_forward(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor | None:
        """The loss of a step, after which call `_graphed.backward` or `leave_out`; None for a batch that no graph can run."""
        assert self._graphed is not None
        batch = self._prepare_inputs(inputs)
        graphable = self._graphable(batch, inputs)
        if isinstance(graphable, str):
            if not self._warned_of_plain_step:
                logger.warning(f"cuda_graphs=True, but batches like this one run kernel by kernel: {graphable}.")
            self._warned_of_plain_step = True
            return None
        if not model.training:
            model.train()
        loss = self._graphed.forward({**graphable, "num_items": num_items_in_batch})
        metrics = self._metrics_of_sft()
        if metrics is not None and self._statistics_row is not None:
            metrics.add(self._statistics_row.clone(), batch if isinstance(batch, CountedBatch) else inputs)
        return loss

    def _graphable(self, batch: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any] | str:
        """The batch as a graph takes it, or why no graph can run it. `inputs` is what it was made from, and may be counted."""
        reason = why_plain_by_names(batch)
        if reason is not None:
            return reason
        counts, length = counts_of(batch, inputs), batch["input_ids"].shape[1]
        if "attention_mask" not in batch and counts.labelled:
            if self._whole_length is None:
                self._whole_length = length
            if length == self._whole_length:  # in pretraining all have the same length
                return {"input_ids": batch["input_ids"], "labels": batch["labels"], "all_labelled": True}
        return why_plain(counts, self._is_causal) or padded_to_few_shapes(batch, self._most_positions)


def why_plain_by_names(batch: dict[str, Any]) -> str | None:
    """Why no graph can run a batch with these names; None if one can."""
    if {"input_ids", "labels"} <= set(batch) <= {"input_ids", "labels", "attention_mask"}:
        return None
    return f"a graph takes input_ids, labels and an attention_mask, and this batch holds {', '.join(sorted(batch))}"


def why_plain(counts: Counts, causal: bool) -> str | None:
    """Why no graph can run a batch with such padding; None if one can."""
    if not causal:
        return "a graph pads on the right, and tokens there change the model's other hidden states"
    if not counts.padded_right:
        return "a graph takes only padding on the right without labels, and this batch has padding elsewhere or with labels"
    return None


def padded_to_few_shapes(batch: dict[str, Any], most: int | None = None) -> dict[str, Any]:
    """The batch without its mask, padded to one of few lengths, so that one graph can run many batches.

    Padding on the right, behind all labels, needs no mask in a causal model.

    Args:
        batch: `input_ids` and `labels`, int64 of shape (batch, length), with or without an `attention_mask`.
        most: positions of the model.

    Returns:
        The padded `input_ids` and `labels`, and `all_labelled`, False.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    more = padded_length(ids.shape[1], most) - ids.shape[1]
    return {
        "input_ids": F.pad(ids, (0, more)),
        "labels": F.pad(labels, (0, more), value=IGNORED_LABEL),
        "all_labelled": False,
    }


def padded_length(length: int, most: int | None = None) -> int:
    """The next of few lengths: a multiple of 16, and above 128 of an eighth of the next power of two, four per octave.

    At most `most`, unless the length itself is larger.
    """
    step = _SMALLEST_STEP if length <= 1 else max(_SMALLEST_STEP, 2 ** (length - 1).bit_length() // 8)
    padded = -(-length // step) * step
    return padded if most is None or length > most else min(padded, most)


@contextmanager
def one_example_a_row() -> Iterator[None]:
    """Let transformers treat each row without positions as one example, which it is.

    It would check whether examples are packed into a row, which waits for the device. During a capture it cannot wait, and to
    be safe makes a mask of all pairs of tokens, with which attention uses a slower kernel that rounds differently.
    """
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def is_causal(model: Any, head: Head) -> bool:
    """Whether hidden states do not depend on later tokens, bit for bit; runs the model twice."""
    device = head.linear.weight.device
    with evaluating(model):
        states = [
            head.hidden_states(model, {"input_ids": torch.tensor([[1, 0, 1, last]], device=device), "use_cache": False})
            for last in (0, 1)
        ]
    return torch.equal(states[0][:, :3], states[1][:, :3])
