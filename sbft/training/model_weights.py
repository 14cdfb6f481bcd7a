"""The model's weights as training needs them: float16 is refused, float32 becomes bfloat16, and the inputs follow."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel, Trainer

from sbft.errors import ModelError, TrainingError
from sbft.grid.convert import put_on_grids
from sbft.optim.sharding import cut_by, is_sharded, parts_of_rows
from sbft.training.peft_models import unwrap

# Words in the names of inputs that are compared with the model's output and therefore keep their precision.
_TARGETS = ("label", "target", "future")

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ModelWeights(_Base):
    """Put before a `Trainer`: checks the weights of every model that it trains, and casts them if its arguments say so."""

    args: Any
    model: Any
    model_wrapped: Any
    warn_once: Callable[[str], None]
    _may_have_foreign_optimizer: Callable[[], bool]
    _optimizer_was_passed: bool
    _stream_layers: Callable[[nn.Module], None]
    _head: Any
    _head_made_from: Any
    _parameters_for_flos: int | None
    _checked_model: weakref.ref[nn.Module] | None = None

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in `Trainer`, for each training and each trial; the new model's weights are checked and cast too."""
        self._head = self._head_made_from = None  # it refers to weights of the previous model
        model: nn.Module = super().call_model_init(*args, **kwargs)
        if self._checked_model is not None:  # the first one is checked together with the arguments
            self._check_weights(model)
        return model

    def _check_weights(self, model: Any) -> None:
        """Cast a float32 model to bfloat16 if its updates will be rounded stochastically, put weights on grids, stream them.

        Raises:
            ModelError: if the model's weights cannot be trained.
            OffloadError: if they are to be streamed, and this machine cannot.
        """
        self._check_dtypes(model)
        if self.args.grids is not None and model is not None:
            put_on_grids(model, self.args.grids)
        if model is not None:
            self._stream_layers(model)

    def _check_dtypes(self, model: Any) -> None:
        self._checked_model = weakref.ref(model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if any(parameter.dtype == torch.float16 for parameter in trainable):
            raise ModelError(
                "The model's weights are float16, whose narrow range loses small gradients without a loss scaler. "
                "Load it with dtype=torch.bfloat16 (or torch.float32)."
            )
        _check_tied_rows(tied_and_sharded(model))
        rounds = self.args.token_optimizer is not None and self.args.stochastic_rounding and self._casts()
        if not rounds or self._may_have_foreign_optimizer() or not isinstance(model, PreTrainedModel):
            return
        wide = [parameter for parameter in trainable if parameter.dtype == torch.float32]
        if len(wide) == len(trainable) and wide:
            if any(map(is_sharded, wide)):
                raise ModelError(
                    "The model's weights are float32 and already sharded, so they can no longer be cast to bfloat16. Load it "
                    "with dtype=torch.bfloat16, or set cast_weights=False to train in float32."
                )
            self.warn_once(
                "The model's float32 weights are cast to bfloat16, which halves them; updates are rounded "
                "stochastically. To train in float32, set cast_weights=False."
            )
            _cast_to_bfloat16(model, self.label_names)

    def _casts(self) -> bool:
        return bool(self.args.cast_weights) and self.args.weights != "float32"

    def _take_replaced_model(self) -> None:
        """Prepare for another `model` than before, as the attribute can be assigned.

        Raises:
            TrainingError: if the optimizer that was passed in updates weights of the previous model.
        """
        previous = None if self._checked_model is None else self._checked_model()
        if self.model is None or self.model is previous:
            return
        self._check_weights(self.model)
        self._parameters_for_flos = None
        if self.accelerator.unwrap_model(self.model_wrapped) is not self.model:
            self.model_wrapped = self.model
        trained = {id(parameter) for parameter in self.model.parameters()}
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        if any(id(parameter) not in trained for group in groups for parameter in group["params"]):
            if self._optimizer_was_passed:
                raise TrainingError(
                    "The trainer's model was replaced, but the optimizer that was passed in updates weights of the previous "
                    "model. Make a new trainer for the new model, or set trainer.optimizer to an optimizer of its weights."
                )
            self.optimizer = None


def tied_and_sharded(model: nn.Module) -> list[Tensor]:
    """The input embedding if it is also the output head and sharded, else nothing.

    FSDP2 reduces the gradients of its two uses one after the other.
    """
    base: Any = unwrap(model)
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    if head is None or not any(map(is_sharded, head.parameters())):
        return []
    return [head.weight] if head.weight is base.get_input_embeddings().weight else []


def _check_tied_rows(weights: list[Tensor]) -> None:
    for weight in weights:
        parts = parts_of_rows(weight)
        # Tensor parallelism alone may split the rows unevenly.
        if weight.shape[0] % parts and cut_by(weight) != {"tp"}:
            raise ModelError(
                f"The model's input embedding is also its output head, and its {weight.shape[0]} rows are not divisible by "
                f"the {parts} processes it is sharded over. FSDP2 then keeps two copies of it, one of which is not trained. "
                "Use a number of processes that divides the rows."
            )


def _cast_to_bfloat16(model: PreTrainedModel, label_names: Iterable[str]) -> None:
    """Cast the float32 parameters. Buffers keep theirs: rotary frequencies, for example, would lose precision for good."""
    kept = beside_statistics(model)
    for parameter in model.parameters():
        if parameter.dtype == torch.float32 and parameter not in kept:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    cast_inputs(model, torch.bfloat16, label_names)


def beside_statistics(model: nn.Module) -> set[Tensor]:
    """Weights of batch norms, which torch requires in the dtype of their running statistics: float32."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return {parameter for norm in norms for parameter in norm.parameters(recurse=False)}


def cast_inputs(model: nn.Module, dtype: torch.dtype, labels: Iterable[str] = ()) -> None:
    """Let a model whose weights were cast take float32 inputs as before: pixels, sound, embeddings.

    Inputs that are compared with the model's output keep their precision, as do tensors with fewer than two dimensions, such
    as counts.

    Args:
        model: a hook casts the inputs of its forward from now on, and those of its copies.
        dtype: of its weights.
        labels: names of inputs that are compared with the output, beyond those whose names say so.
    """
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _CastInputs):
            return
    model.register_forward_pre_hook(_CastInputs(dtype, frozenset(labels)), with_kwargs=True)


class _CastInputs:
    """The forward pre-hook of `cast_inputs`."""

    def __init__(self, dtype: torch.dtype, labels: frozenset[str]) -> None:
        self._dtype = dtype
        self._labels = labels

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cast = {
            name: value if self._is_target(name) else self._cast(value, "mask" in name)
            for name, value in kwargs.items()
        }
        return tuple(self._cast(value) for value in args), cast

    def _is_target(self, name: str) -> bool:
        return name in self._labels or any(word in name for word in _TARGETS)

    def _cast(self, value: Any, is_mask: bool = False) -> Any:
        if isinstance(value, Tensor):
            if value.dtype not in (torch.float32, torch.float64) or value.dim() < 2:
                return value
            if is_mask:  # its lowest value would become -inf, and softmax of a row of -inf is NaN
                value = value.clamp(torch.finfo(self._dtype).min, torch.finfo(self._dtype).max)
            return value.to(self._dtype)
        if type(value) in (list, tuple):
            return type(value)(self._cast(part, is_mask) for part in value)
        return value
