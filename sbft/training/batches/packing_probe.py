"""Whether documents that are packed into one row see one another, asked of the model itself.

Each class of transformers decides for itself what it makes of positions that start again within a row: many keep documents
apart, others take the row for one document, and a recurrent state always runs on. Nothing in a config says which.
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
# Longer than the kernels of convolutions (4 tokens), which reach over a document's first tokens alone.
_TOKENS = 8
# Batches that are looked at for documents: packed data is packed from its first row on.
_LOOKED_AT = 8


class CannotTell(Exception):
    """A model cannot be asked what it does with packed rows; the message says why."""


def packing_leaks(model: Any, rows: int = 1) -> bool:
    """Whether documents in a packed row of sbft's see one another in a loaded model, or in its class where it is sharded.

    Raises:
        CannotTell: if it cannot be found out.
    """
    if not any(map(is_sharded, model.parameters())):
        try:
            return sees_former_document(model, rows=rows)
        except CannotTell as error:
            logger.debug(f"{error}; its class is asked in miniature")
    return packing_leaks_in(unwrap(model).config)  # type: ignore[arg-type]


def packing_leaks_in(
    config: PreTrainedConfig, keys: Iterable[str] = ("position_ids",), *, rows: int = 1, trust_remote_code: bool = False
) -> bool:
    """The same of the class of models that a config is of, with random weights in miniature.

    Args:
        config: of the model.
        keys: as in `sees_former_document`.
        rows: likewise.
        trust_remote_code: run the Python code that comes with the checkpoint.

    Raises:
        CannotTell: if it cannot be found out.
    """
    reason = "it cannot be run"
    try:
        for model in miniatures(config, trust_remote_code=trust_remote_code, use_cache=False):
            try:
                return sees_former_document(model, keys, rows=rows)
            except CannotTell as error:
                reason = str(error)
    except NoMiniature as error:
        reason = str(error) if reason == "it cannot be run" else reason
    raise CannotTell(reason)


def refuse_leaking_rows(model: Any, rows: int = 1) -> None:
    """Refuse to pack for a model in which documents of a row see one another.

    Args:
        model: as its trainer has it.
        rows: of a batch.

    Raises:
        ModelError: if they do, or nobody can tell.
    """
    name = type(unwrap(model)).__name__
    try:
        leaks = packing_leaks(model, rows)
    except CannotTell as error:
        raise ModelError(unknown_in_words(name, error)) from error
    if leaks:
        raise ModelError(f"{leak_in_words(name)} {way_out()}")


def leak_in_words(name: str) -> str:
    """What is wrong with packing for a class of models."""
    return (
        f"data.packing is true, and {name} lets the documents that are packed into one row see one another: it would learn to "
        "take each for the continuation of the one before."
    )


def unknown_in_words(name: str, error: CannotTell) -> str:
    """That nobody can tell, and why."""
    return (
        f"data.packing is true, and whether {name} keeps the documents of a packed row apart cannot be found out ({error}). "
        f"{way_out()}"
    )


def way_out() -> str:
    """What to type in the place of packing."""
    return f"Add {NO_PACKING}; rows of one example each train as well."


def sees_former_document(model: Any, keys: Iterable[str] = ("position_ids",), *, rows: int = 1) -> bool:
    """Whether what a model says of a document depends on the one before it in a packed row; runs it once on 16 tokens.

    It is asked for the gradient of the second document's logits by the first one's embeddings, which is exactly zero where no
    path leads from one to the other: unlike a difference of logits, it does not depend on how products are rounded.

    Args:
        model: a causal language model, or an adapter on one; its weights, gradients and mode stay as they are.
        keys: what a batch holds beside its tokens; of these, `position_ids` come to the model only if its forward names them.
        rows: of a batch; some attention takes no notice of documents where there are several.

    Raises:
        CannotTell: if it cannot be run so.
    """
    base: Any = unwrap(model)
    inputs = _two_documents(base, keys, min(rows, 2))
    embedding = base.get_input_embeddings()
    caught: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        caught.append(output.detach().requires_grad_())
        return caught[0].clone()  # which a model may write to

    handle = embedding.register_forward_hook(watch)
    try:
        with left_as_it_was(base, training=False), torch.enable_grad():
            logits = base(**inputs).logits[0, _TOKENS:].float()
            # The plain sum would have no gradient where what is summed is normalized.
            weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
            (gradient,) = torch.autograd.grad((logits * weights).sum(), caught[0])
    except Exception as error:  # of the model's own code
        raise CannotTell(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    finally:
        handle.remove()
    if not gradient[0, _TOKENS:].any():
        raise CannotTell("no gradient reaches its embedding")
    return bool((gradient[0, :_TOKENS] != 0).any())


def _two_documents(model: Any, keys: Iterable[str], rows: int) -> dict[str, Any]:
    """A packed row as batches with these keys have it."""
    weight = model.get_input_embeddings().weight
    ids = (torch.arange(2 * _TOKENS, device=weight.device) % weight.shape[0]).unsqueeze(0)
    bounds = torch.tensor([0, _TOKENS, 2 * _TOKENS], dtype=torch.int32, device=ids.device)
    known: dict[str, Any] = {
        "position_ids": torch.arange(_TOKENS, device=ids.device).repeat(2).unsqueeze(0),
        "attention_mask": torch.ones_like(ids),
        "seq_idx": torch.arange(2, dtype=torch.int32, device=ids.device).repeat_interleave(_TOKENS).unsqueeze(0),
        **{f"cu_seq_lens_{side}": bounds for side in "qk"},
        **{f"max_length_{side}": _TOKENS for side in "qk"},
    }
    inputs = {name: value for name, value in known.items() if name in keys}
    if not takes_positions(model):
        inputs.pop("position_ids", None)
    in_rows = {"input_ids": ids, **inputs}
    return {
        name: value.repeat(rows, 1) if isinstance(value, Tensor) and value.dim() == 2 else value
        for name, value in in_rows.items()
    }


def takes_positions(model: nn.Module) -> bool:
    """Whether the forward of a model names `position_ids`; a trainer drops columns that it does not name."""
    return "position_ids" in inspect.signature(model.forward).parameters


class PackedBatches:
    """Looks into the first batches of a trainer, and warns once where they hold documents that the model mixes up."""

    def __init__(self) -> None:
        self._left = _LOOKED_AT

    def look(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Look into one more batch, if there is anything left to find out."""
        if self._left == 0 or "position_ids" not in batch:
            return
        self._left -= 1
        positions, mask = batch["position_ids"], batch.get("attention_mask")
        if not _restart(positions) or (isinstance(mask, Tensor) and mask.dim() != 2):
            return  # a mask of pairs of tokens says who sees whom
        self._left = 0
        name = type(unwrap(model)).__name__
        try:
            leaks = _sees_former(model, batch.keys(), len(positions))
        except CannotTell as error:
            logger.warning(
                f"The positions of a batch start again within its rows, as packed documents' do, and whether {name} keeps "
                f"these apart cannot be found out: {error}."
            )
            return
        if leaks:
            beside = ", because the batches hold an attention_mask too" if _is_to_blame(model, batch) else ""
            logger.warning(
                f"The positions of a batch start again within its rows, as packed documents' do, but {name} lets these "
                f"documents see one another{beside}. Give it one document a row (packing=False, padding_free=False)"
                f"{', or batches without the mask' if beside else ''}."
            )


def _sees_former(model: nn.Module, keys: Iterable[str], rows: int) -> bool:
    """As `sees_former_document`; of a sharded model its class is asked, since the other processes may not be asking now."""
    if any(map(is_sharded, model.parameters())):
        return packing_leaks_in(unwrap(model).config, keys, rows=rows)  # type: ignore[arg-type]
    return sees_former_document(model, keys, rows=rows)


def warn_of_dropped_positions(model: nn.Module, examples: Any) -> None:
    """Warn where a data set holds positions that a trainer takes out of it, because the model's forward names none."""
    columns = getattr(examples, "column_names", None) or ()  # of `datasets`, whose columns alone a trainer takes out
    if "position_ids" in columns and not takes_positions(unwrap(model)):
        logger.warning(
            f"The training set has a column position_ids, which {type(unwrap(model)).__name__} does not take: if its rows are "
            "packed, documents see one another. Give it one document a row."
        )


def _restart(positions: Any) -> bool:
    return isinstance(positions, Tensor) and positions.dim() == 2 and bool((positions[:, 1:] == 0).any())


def _is_to_blame(model: nn.Module, batch: dict[str, Any]) -> bool:
    """Whether a model keeps documents apart if it is given no mask of padding."""
    without = batch.keys() - {"attention_mask"}
    try:
        return without != batch.keys() and not _sees_former(model, without, 1)
    except CannotTell:
        return False
