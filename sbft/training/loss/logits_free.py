"""The trainer's part of the loss without logits: it is used if it equals the loss of the trainer and the model."""

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
from sbft.training.loss.sliced_vocabulary import SlicedVocabulary
from sbft.training.loss.tied_embeddings import TiedEmbedding
from sbft.training.loss.token_statistics import TokenStatistics

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

# The functions whose loss equals the one without logits. They are known by name, because TRL need not be installed.
_OF_TRAINER = ("transformers.trainer", "Trainer.compute_loss")
_OF_SFT_TRAINER = ("trl.trainer.sft_trainer", "SFTTrainer.compute_loss")
# Inputs that say which tokens there are, and which attend to which. How much each token counts is up to the labels alone.
_USUAL = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "labels", "shift_labels", "use_cache",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
}  # fmt: skip
_OF_IMAGES_AND_SOUND = ("pixel_", "image_", "video_", "mm_", "audio_", "input_features", "feature_", "second_per_grid")


class LogitsFreeLoss(_Base):
    """Put before a `Trainer`: computes the loss from hidden states, if the trainer and its model would compute the same loss.

    Otherwise the loss is theirs, and one warning says why.
    """

    args: Any
    model: Any
    _tied: TiedEmbedding | None = None
    _sliced: SlicedVocabulary | None = None
    _in_training_step = False
    _head: Head | None = None
    _head_made_from: Hashable = None
    _batches_tried: dict[frozenset[str], bool]
    _logged_warnings: set[str]
    _sft_metrics: SftMetrics | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss without logits, if it equals the trainer's own loss and the model's outputs are not asked for."""
        if return_outputs or not self._takes_logits_free_loss(inputs):
            # Some overridden compute_loss take num_items_in_batch by keyword only or not at all, and only training passes it.
            items = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **items)
        head = self._find_head()
        assert head is not None
        weight = self._tied.head_weight() if self._tied is not None and self._in_training_step else None
        receiver = self._sliced.begin_forward() if self._sliced is not None and self._in_training_step else None
        if not self.model_accepts_loss_kwargs:
            num_items_in_batch = None
        metrics = self._metrics_of_sft()
        statistics = None if metrics is None else TokenStatistics()
        loss = head.loss(model, inputs, num_items_in_batch, weight=weight, statistics=statistics, receiver=receiver)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if metrics is not None and statistics is not None:
            metrics.add(statistics.row(), inputs)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`; TRL's SFTTrainer gets the metrics that it would have gathered itself."""
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
        return next(vars(base)["compute_loss"] for base in below if "compute_loss" in vars(base))

    def _takes_logits_free_loss(self, inputs: Any) -> bool:
        return _has_labels_of_tokens(inputs) and self._find_head() is not None and self._is_usual(inputs)

    def _has_own_loss(self) -> bool:
        """Whether the trainer computes the loss from the model's outputs, or in another unusual way."""
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
        """The model's head, which is looked for once for each model; None, with a warning, if another loss is needed."""
        made_from = (source_of_head(self.model), self._has_own_loss(), self.model_accepts_loss_kwargs)
        if made_from != self._head_made_from:
            self._batches_tried = {}
            self._head = self._look_for_head()
            self._head_made_from = made_from
        return self._head

    def _look_for_head(self) -> Head | None:
        # A loss of TRL's own, such as dft.
        other_loss = vars(self.args).get("loss_type", "nll") != "nll"
        # use_liger_kernel puts Liger's fused loss into the model's forward.
        model_loss = other_loss or self.args.torch_compile or self.args.use_liger_kernel
        if not self.args.logits_free_loss or model_loss:
            return None
        if self._has_its_own_compute_loss():
            self.warn_once(
                f"The loss is that of {self._loss_below().__qualname__}, which the loss without logits does not replace. "
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
                f"{reason or 'another process found that its own loss differs'}."
            )
            return None
        return head

    def _is_usual(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the loss without logits holds for a batch with these inputs. A new set of unusual inputs is tried once.

        With several processes, only one of them may have such a batch, and its trial would wait for the others. Then all use
        the model's own loss.
        """
        unusual = frozenset(name for name, value in inputs.items() if value is not None and not _is_usual_name(name))
        if self.accelerator.num_processes > 1:
            if self._all_agree(not unusual):
                return True
            names = ", ".join(sorted(unusual)) or "further inputs, on another process,"
            self.warn_once(
                f"The loss of batches that hold {names} is taken from the logits of all tokens, which costs memory: several "
                "processes do not try whether the loss without logits is the same."
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
        """Whether it is so on all processes: with different losses they would wait for one another forever."""
        if self.accelerator.num_processes == 1:
            return is_so
        return bool(self.accelerator.gather(torch.tensor([is_so], device=self.args.device)).all())

    def warn_once(self, message: str) -> None:
        """Log a warning, unless this trainer has logged the same one before."""
        if message not in self._logged_warnings:
            self._logged_warnings.add(message)
            logger.warning(message)


def _is_usual_name(name: str) -> bool:
    return name in _USUAL or (name.startswith(_OF_IMAGES_AND_SOUND) and "label" not in name and "weight" not in name)


def _has_labels_of_tokens(inputs: Any) -> bool:
    if not isinstance(inputs, Mapping):
        return False
    labels = inputs.get("labels") if inputs.get("shift_labels") is None else inputs.get("shift_labels")
    return isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()


def _name(function: Callable[..., Any]) -> tuple[str, str]:
    """Module and name of a function; empty for a wrapper, which bears the name of the function that it wraps."""
    return ("", "") if hasattr(function, "__wrapped__") else (function.__module__, function.__qualname__)
