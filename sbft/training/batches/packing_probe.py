"""Finds out by running the model whether documents that are packed into one row see one another.

Each class in transformers handles positions that restart within a row in its own way. Many keep the documents apart, others
treat the row as one document, and a recurrent state is always carried over. No config says which.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from sbft.errors import ModelError
from sbft.models.miniature import NoMiniature, miniatures
from sbft.optim.sharding import is_sharded
from sbft.training.model_state import left_as_it_was
from sbft.training.peft_models import unwrap

logger = logging.getLogger(__name__)

NO_PACKING = "--set data.packing=false"
# Tokens of a document: more than the width of convolutions (4), so that these do not reach all of the second document.
_TOKENS = 8
# Batches that are checked for packed documents, which packed data has from its first row on.
_CHECKED_BATCHES = 8


class CannotTell(Exception):
    """It cannot be determined what a model does with packed rows; the message says why."""


def packing_leaks(model: Any, rows: int = 1) -> bool:
    """Whether documents in a row that sbft has packed see one another. A sharded model is replaced by a miniature of its class.

    Args:
        model: a loaded model.
        rows: of a batch.

    Raises:
        CannotTell: if it cannot be found out.
    """
    if not any(map(is_sharded, model.parameters())):
        try:
            return sees_previous_document(model, rows=rows)
        except CannotTell as error:
            logger.debug(f"{error}; a miniature of its class is tried")
    return packing_leaks_in(unwrap(model).config)  # type: ignore[arg-type]


def packing_leaks_in(
    config: PreTrainedConfig, keys: Iterable[str] = ("position_ids",), *, rows: int = 1, trust_remote_code: bool = False
) -> bool:
    """The same for the class of models that a config belongs to, tried on a miniature with random weights.

    Args:
        config: of the model.
        keys: as in `sees_previous_document`.
        rows: as in `sees_previous_document`.
        trust_remote_code: run the Python code that comes with the checkpoint.

    Raises:
        CannotTell: if it cannot be found out.
    """
    reason = "it cannot be run"
    try:
        for model in miniatures(config, trust_remote_code=trust_remote_code, use_cache=False):
            try:
                return sees_previous_document(model, keys, rows=rows)
            except CannotTell as error:
                reason = str(error)
    except NoMiniature as error:
        reason = str(error) if reason == "it cannot be run" else reason
    raise CannotTell(reason)


def refuse_leaking_rows(model: Any, rows: int = 1) -> None:
    """Refuse to pack for a model in which the documents of a row see one another.

    Args:
        model: as its trainer has it.
        rows: of a batch.

    Raises:
        ModelError: if they do, or it cannot be found out.
    """
    name = type(unwrap(model)).__name__
    try:
        leaks = packing_leaks(model, rows)
    except CannotTell as error:
        raise ModelError(unknown_in_words(name, error)) from error
    if leaks:
        raise ModelError(f"{leak_in_words(name)} {fix_in_words()}")


def leak_in_words(name: str) -> str:
    """A sentence on what is wrong with packing for a class of models."""
    return (
        f"data.packing is true, but {name} lets the documents that are packed into one row see one another. It would learn to "
        "treat each as the continuation of the one before."
    )


def unknown_in_words(name: str, error: CannotTell) -> str:
    """A sentence on why it cannot be determined."""
    return (
        f"data.packing is true, but it cannot be determined whether {name} keeps packed documents apart ({error}). "
        f"{fix_in_words()}"
    )


def fix_in_words() -> str:
    """What to type instead of packing."""
    return f"Add {NO_PACKING}; rows of one example each train as well."


def sees_previous_document(model: Any, keys: Iterable[str] = ("position_ids",), *, rows: int = 1) -> bool:
    """Whether a model's logits for a document depend on the previous document in a packed row; runs it once on 16 tokens.

    The gradient of the second document's logits with respect to the first one's embeddings is exactly zero if no path connects
    them. Unlike a difference of logits, it does not depend on how products are rounded.

    Args:
        model: a causal language model, or an adapter on one; its weights, gradients and mode stay as they are.
        keys: what a batch holds besides its tokens. `position_ids` are passed to the model only if its forward names them.
        rows: of a batch; some attention implementations ignore the documents if there are several.

    Raises:
        CannotTell: if the model cannot be run this way.
    """
    base: Any = unwrap(model)
    inputs = _two_documents(base, keys, min(rows, 2))
    embedding = base.get_input_embeddings()
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        caught.append(output.detach().requires_grad_())
        return caught[0].clone()  # the model may write to it

    handle = embedding.register_forward_hook(catch)
    try:
        with left_as_it_was(base, training=False), torch.enable_grad():
            logits = base(**inputs).logits[0, _TOKENS:].float()
            # The plain sum of normalized logits would have no gradient.
            weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
            (gradient,) = torch.autograd.grad((logits * weights).sum(), caught[0])
    except Exception as error:  # the model's own code may raise anything
        raise CannotTell(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    finally:
        handle.remove()
    if not gradient[0, _TOKENS:].any():
        raise CannotTell("no gradient reaches its embedding")
    return bool((gradient[0, :_TOKENS] != 0).any())


def _two_documents(model: Any, keys: Iterable[str], rows: int) -> dict[str, Any]:
    """A batch of packed rows with two documents each, with those of `keys` that packed batches have."""
    weight = model.get_input_embeddings().weight
    ids = (torch.arange(2 * _TOKENS, device=weight.device) % weight.shape[0]).unsqueeze(0)
    bounds = torch.tensor([0, _TOKENS, 2 * _TOKENS], dtype=torch.int32, device=ids.device)
    possible: dict[str, Any] = {
        "position_ids": torch.arange(_TOKENS, device=ids.device).repeat(2).unsqueeze(0),
        "attention_mask": torch.ones_like(ids),
        "seq_idx": torch.arange(2, dtype=torch.int32, device=ids.device).repeat_interleave(_TOKENS).unsqueeze(0),
        **{f"cu_seq_lens_{side}": bounds for side in "qk"},
        **{f"max_length_{side}": _TOKENS for side in "qk"},
    }
    inputs = {name: value for name, value in possible.items() if name in keys}
    if not takes_positions(model):
        inputs.pop("position_ids", None)
    one_row = {"input_ids": ids, **inputs}
    return {
        name: value.repeat(rows, 1) if isinstance(value, Tensor) and value.dim() == 2 else value
        for name, value in one_row.items()
    }


def takes_positions(model: nn.Module) -> bool:
    """Whether a model's forward names `position_ids`; a trainer drops the columns that it does not name."""
    return "position_ids" in inspect.signature(model.forward).parameters


class PackedBatches:
    """Checks the first batches of a trainer, and warns once if they hold packed documents that see one another."""

    def __init__(self) -> None:
        self._left = _CHECKED_BATCHES

    def look(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Check one more batch, if it is among the first and there was no result yet."""
        if self._left == 0 or "position_ids" not in batch:
            return
        self._left -= 1
        positions, mask = batch["position_ids"], batch.get("attention_mask")
        if not _restart(positions) or (isinstance(mask, Tensor) and mask.dim() != 2):
            return  # a mask over pairs of tokens may keep documents apart
        self._left = 0
        name = type(unwrap(model)).__name__
        try:
            leaks = _sees_previous(model, batch.keys(), len(positions))
        except CannotTell as error:
            logger.warning(
                f"The positions of a batch restart within its rows, as with packed documents, but whether {name} keeps "
                f"these apart cannot be found out: {error}."
            )
            return
        if leaks:
            because = ", because the batches also hold an attention_mask" if _mask_is_the_cause(model, batch) else ""
            logger.warning(
                f"The positions of a batch restart within its rows, as with packed documents, but {name} lets these "
                f"documents see one another{because}. Give it one document per row (packing=False, padding_free=False)"
                f"{', or batches without the mask' if because else ''}."
            )


def _sees_previous(model: nn.Module, keys: Iterable[str], rows: int) -> bool:
    """As `sees_previous_document`; a sharded model is tried in miniature, since other processes may not take part now."""
    if any(map(is_sharded, model.parameters())):
        return packing_leaks_in(unwrap(model).config, keys, rows=rows)  # type: ignore[arg-type]
    return sees_previous_document(model, keys, rows=rows)


def warn_of_dropped_positions(model: nn.Module, examples: Any) -> None:
    """Warn if a data set holds positions that the trainer drops because the model's forward does not name them."""
    columns = getattr(examples, "column_names", None) or ()  # a trainer drops columns of `datasets` only
    if "position_ids" in columns and not takes_positions(unwrap(model)):
        logger.warning(
            f"The training set has a column position_ids, which {type(unwrap(model)).__name__} does not take: if its rows are "
            "packed, documents see one another. Give it one document per row."
        )


def _restart(positions: Any) -> bool:
    return isinstance(positions, Tensor) and positions.dim() == 2 and bool((positions[:, 1:] == 0).any())


def _mask_is_the_cause(model: nn.Module, batch: dict[str, Any]) -> bool:
    """Whether a model keeps documents apart if it is given no padding mask."""
    without = batch.keys() - {"attention_mask"}
    try:
        return without != batch.keys() and not _sees_previous(model, without, 1)
    except CannotTell:
        return False
