"""The trainer's part of the loss without logits: where it may stand for the loss of the trainer and the model underneath."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from sbft.training.loss.head import Head, NoHead, UnknownHead, source_of_head
from sbft.training.loss.head_trial import check_batch, find_head
from sbft.training.loss.sft_metrics import SftMetrics
from sbft.training.loss.tied_embeddings import TiedEmbedding
from sbft.training.loss.token_statistics import TokenStatistics

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

# The functions that the loss without logits equals, by name: TRL need not be installed.
_OF_TRAINER = ("transformers.trainer", "Trainer.compute_loss")
_OF_SFT_TRAINER = ("trl.trainer.sft_trainer", "SFTTrainer.compute_loss")
# What says which tokens there are, and which see which; how much each counts, labels alone say.
_USUAL = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "labels", "shift_labels", "use_cache",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
}  # fmt: skip
_OF_OTHER_SENSES = ("pixel_", "image_", "video_", "mm_", "audio_", "input_features", "feature_", "second_per_grid")


class LogitsFreeLoss(_Base):
    """Put before a `Trainer`: its loss is taken from hidden states, where that is what the trainer and its model would make.

    All else is left to them, with one warning that says why.
    """

    args: Any
    model: Any
    _tied: TiedEmbedding | None = None
    _in_training_step = False
    _head: Head | None = None
    _head_made_from: Hashable = None
    _batches_tried: dict[frozenset[str], bool]
    _said: set[str]
    _sft_metrics: SftMetrics | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss without logits, where it is the loss of the trainer underneath and nobody asks for the model's outputs."""
        if return_outputs or not self._takes_logits_free_loss(inputs):
            # Many a compute_loss takes the labels' number, which only training gives, by its name alone, or not at all.
            items = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **items)
        head = self._find_head()
        assert head is not None
        weight = self._tied.head_weight() if self._tied is not None and self._in_training_step else None
        if not self.model_accepts_loss_kwargs:
            num_items_in_batch = None
        metrics = self._metrics_of_sft()
        statistics = None if metrics is None else TokenStatistics()
        loss = head.loss(model, inputs, num_items_in_batch, weight=weight, statistics=statistics)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if metrics is not None and statistics is not None:
            metrics.add(statistics.row(), inputs)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`; TRL's finds the metrics that it would have gathered itself."""
        if self._sft_metrics is not None:
            self._sft_metrics.hand_over()
        super().log(logs, *args, **kwargs)

    def _metrics_of_sft(self) -> SftMetrics | None:
        if self._sft_metrics is None and _name(self._loss_below()) == _OF_SFT_TRAINER:
            self._sft_metrics = SftMetrics(self)
        return self._sft_metrics

    def _loss_below(self) -> Callable[..., Any]:
        """`compute_loss` as it would be without this class."""
        classes = type(self).__mro__
        below = classes[classes.index(LogitsFreeLoss) + 1 :]
        return next(vars(one)["compute_loss"] for one in below if "compute_loss" in vars(one))

    def _takes_logits_free_loss(self, inputs: Any) -> bool:
        return _has_labels_of_tokens(inputs) and self._find_head() is not None and self._is_usual(inputs)

    def _has_own_loss(self) -> bool:
        """Whether the trainer makes the loss of what a model gives it, or in another way than the usual ones."""
        parallel = self.accelerator.parallelism_config
        return (
            self.label_smoother is not None
            or self.compute_loss_func is not None
            or self.args.n_gpu > 1
            or self._has_its_own_compute_loss()
            or (parallel is not None and any(vars(parallel).get(name, 1) > 1 for name in ("cp_size", "sp_size")))
        )

    def _has_its_own_compute_loss(self) -> bool:
        return _name(self._loss_below()) not in (_OF_TRAINER, _OF_SFT_TRAINER)

    def _find_head(self) -> Head | None:
        """The model's head, sought once for each model; None, with a warning, where another loss has to do."""
        made_from = (source_of_head(self.model), self._has_own_loss(), self.model_accepts_loss_kwargs)
        if made_from != self._head_made_from:
            self._batches_tried = {}
            self._head = self._sought_head()
            self._head_made_from = made_from
        return self._head

    def _sought_head(self) -> Head | None:
        # A loss that only TRL has, such as dft.
        other_loss = vars(self.args).get("loss_type", "nll") != "nll"
        # use_liger_kernel has put Liger's own fused loss into the model's forward.
        model_loss = other_loss or self.args.torch_compile or self.args.use_liger_kernel
        if not self.args.logits_free_loss or model_loss:
            return None
        if self._has_its_own_compute_loss():
            self.warn_once(
                f"The loss is that of {self._loss_below().__qualname__}, which the loss without logits does not stand for. "
                "If it makes the logits of all tokens, they cost memory."
            )
        if self._has_own_loss():
            return None
        head, reason = None, None
        try:
            head = find_head(self.model, with_num_items=self.model_accepts_loss_kwargs)
        except NoHead:
            return None  # nothing is lost
        except UnknownHead as unknown:
            reason = str(unknown)
        if not self._all_agree(head is not None):
            self.warn_once(
                f"The loss of {type(self.model).__name__} is taken from the logits of all tokens, which costs memory: "
                f"{reason or 'another process found it to be another one'}."
            )
            return None
        return head

    def _is_usual(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the loss without logits holds for a batch of such names; what is unusual is tried once.

        Of several processes one alone may have such a batch, and a trial would wait for the others: then all take the model's
        own loss.
        """
        unusual = frozenset(name for name, value in inputs.items() if value is not None and not _is_usual_name(name))
        if self.accelerator.num_processes > 1:
            if self._all_agree(not unusual):
                return True
            held = ", ".join(sorted(unusual)) or "what those of another process hold"
            self.warn_once(
                f"The loss of batches that hold {held} is taken from the logits of all tokens, which costs memory: several "
                "processes do not try whether the loss without them is the same."
            )
            return False
        if not unusual:
            return True
        if unusual not in self._batches_tried:
            assert self._head is not None
            reason = None
            try:
                check_batch(self.model, self._head, dict(inputs), with_num_items=self.model_accepts_loss_kwargs)
            except UnknownHead as unknown:
                reason = str(unknown)
            self._batches_tried[unusual] = reason is None
            if reason is not None:
                self.warn_once(
                    f"The loss of batches that hold {', '.join(sorted(unusual))} is taken from the logits of all tokens, which "
                    f"costs memory: {reason}."
                )
        return self._batches_tried[unusual]

    def _all_agree(self, is_so: bool) -> bool:
        """Processes that share a model would wait for one another for ever if they took different losses."""
        if self.accelerator.num_processes == 1:
            return is_so
        return bool(self.accelerator.gather(torch.tensor([is_so], device=self.args.device)).all())

    def warn_once(self, message: str) -> None:
        """Say something that holds for all of a trainer's life, however often it is found."""
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)


def _is_usual_name(name: str) -> bool:
    return name in _USUAL or (name.startswith(_OF_OTHER_SENSES) and "label" not in name and "weight" not in name)


def _has_labels_of_tokens(inputs: Any) -> bool:
    if not isinstance(inputs, Mapping):
        return False
    labels = inputs.get("labels") if inputs.get("shift_labels") is None else inputs.get("shift_labels")
    return isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()


def _name(function: Callable[..., Any]) -> tuple[str, str]:
    """Where a function was written; one that was put around another keeps its name, and is known by what it holds."""
    return ("", "") if hasattr(function, "__wrapped__") else (function.__module__, function.__qualname__)
