"""Finds a model's head by running it: a trial on a few tokens shows whether the loss from the head is the model's own loss.

A class does not say what its forward does. It may scale or cap the logits, add a term to the loss, leave the labels unshifted,
make a decoder's inputs from them, or call the head twice. The trial detects all of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sbft.data.collate import IGNORED_LABEL
from sbft.optim.sharding import is_sharded, whole
from sbft.training.loss.head import Head, UnknownHead, head_candidates
from sbft.training.model_state import accelerators_of, left_as_it_was, pre_hook, shard_again
from sbft.training.peft_models import unwrap

_ROWS, _POSITIONS = 2, 6
# Positions without a label. Their number differs between the rows, so that a mean over rows of means differs from the mean.
_UNLABELLED = ((0, 3), (2, 4, 5))


class TrialFailed(UnknownHead):
    """The model raises an error when it is run on the trial's tokens."""


def find_head(model: nn.Module, *, with_num_items: bool = False) -> Head:
    """The head of a causal language model, or of the one inside a PEFT model. Runs the model three times on a few tokens.

    Args:
        model: in any mode, which it keeps.
        with_num_items: whether the model's forward is passed `num_items_in_batch`, by which it divides its loss.

    Raises:
        UnknownHead: if the model's logits or its loss are not those of a plain linear head.
    """
    heads = head_candidates(model)
    base: Any = unwrap(model)
    batch = trial_batch(base, heads[0])
    head = head_that_makes_the_logits(model, heads, batch["input_ids"][:1])
    check_loss(model, head, batch, with_num_items=with_num_items)
    return head


def check_batch(model: nn.Module, head: Head, batch: dict[str, Any], *, with_num_items: bool) -> None:
    """Check the loss of a small part of a batch with further inputs, such as weights of its tokens.

    Raises:
        UnknownHead: if the model's own loss of it is not the one from its head.
    """
    base: Any = unwrap(model)
    part = small_part(batch, trial_batch(base, head)["labels"])
    check_loss(model, head, part, with_num_items=with_num_items)


def head_that_makes_the_logits(model: nn.Module, heads: list[Head], ids: Tensor) -> Head:
    """The first of `heads` that turns large random hidden states into the same logits as the model does.

    Args:
        model: that has them.
        heads: candidates, which share one linear layer.
        ids: (1, positions), any tokens.

    Raises:
        UnknownHead: if none of them does.
    """
    linear = heads[0].linear
    generator = torch.Generator().manual_seed(0)
    weight = whole(linear.weight.detach())
    probe = torch.randn(ids.shape[1], linear.in_features, generator=generator).to(weight)
    # Raw logits of 60 and more, so that an overlooked soft cap or factor makes a difference.
    probe = probe * (60.0 / F.linear(probe, weight).float().std().clamp(min=1e-6)).to(probe)
    autocast_dtypes: list[torch.dtype | None] = []

    def inject(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        autocast_dtypes.append(heads[0].autocast_dtype())
        return (probe.unsqueeze(0),)

    with left_as_it_was(model, training=False), torch.no_grad():
        with _errors_of_the_model(), pre_hook(linear, inject):
            own = model(input_ids=ids, use_cache=False).logits
        if not autocast_dtypes:
            raise UnknownHead("its logits are not made by its output embedding")
        for head in heads:
            with head.autocast(autocast_dtypes[0]):
                expected = head.logits(probe.unsqueeze(0))
            dtype = autocast_dtypes[0] or weight.dtype
            if own.shape == expected.shape and _within_roundings(own.float(), expected, dtype):
                return head
    raise UnknownHead("its logits are not those of its head, scaled and capped as its config says")


def _within_roundings(own: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    # Up to four roundings in `dtype` (product, factor, cap, tanh), of numbers up to the largest logit.
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max()
    return bool((own - expected).abs().max() <= tolerance)


def check_loss(model: nn.Module, head: Head, batch: dict[str, Any], *, with_num_items: bool) -> None:
    """Compare the model's own loss of a small batch with the loss from `head`.

    The model is in training mode, because it may add terms there that it leaves out in evaluation mode. If it fails in training
    mode, it is run in evaluation mode.

    Args:
        model: that has the head.
        head: to check.
        batch: with `labels`, as `trial_batch` or `small_part` makes one.
        with_num_items: whether the model's forward is passed `num_items_in_batch`, by which it divides its loss.

    Raises:
        UnknownHead: if the losses differ, or the model fails in both modes.
    """
    try:
        with left_as_it_was(model, training=True), _errors_of_the_model():
            _compare(model, head, batch, with_num_items)
    except TrialFailed:
        with left_as_it_was(model, training=False), _errors_of_the_model():
            _compare(model, head, batch, with_num_items)


@contextmanager
def _errors_of_the_model() -> Iterator[None]:
    try:
        yield
    except (UnknownHead, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a forward may raise anything on inputs that it was not written for
        first_line = str(error).partition("\n")[0]
        raise TrialFailed(f"it fails on a trial of a few tokens ({type(error).__name__}: {first_line})") from error


def _compare(model: nn.Module, head: Head, batch: dict[str, Any], with_num_items: bool) -> None:
    targets = {name: batch[name] for name in ("labels", "shift_labels") if batch.get(name) is not None}
    inputs = {**{name: value for name, value in batch.items() if name not in targets}, "use_cache": False}
    next_labels = targets["shift_labels"] if "shift_labels" in targets else targets["labels"][:, 1:]
    items = (next_labels != IGNORED_LABEL).sum() * (3 if with_num_items else 1)
    # With gradients FSDP2 would prepare for a backward, which does not follow.
    with torch.set_grad_enabled(not any(map(is_sharded, model.parameters()))):
        own, hidden, autocast_dtype = _own_loss(
            model, head, {**inputs, **targets, **({"num_items_in_batch": items} if with_num_items else {})}
        )
        _seed(model)
        reached = head.hidden_states(model, inputs)
        shard_again(model)
        if not _are_alike(reached, hidden):
            raise UnknownHead("what reaches its output embedding depends on the labels")
        with head.autocast(autocast_dtype):
            logits = head.logits(hidden.detach())
        if "shift_labels" not in targets:
            logits = logits[:, :-1]
        if logits.shape[:2] != next_labels.shape:
            raise UnknownHead("it makes more or fewer hidden states than there are tokens")
        expected = (
            F.cross_entropy(logits.flatten(0, 1), next_labels.flatten().to(logits.device), reduction="sum") / items
        )
        if with_num_items and _is_near(own, 3 * expected, logits, head):
            raise UnknownHead("it is passed num_items_in_batch and does not divide its loss by it")
        _check_values(own, expected, logits, head)
        _check_weights(model, own, reached, expected)


def _own_loss(model: nn.Module, head: Head, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, torch.dtype | None]:
    """The model's own loss, the hidden states that its head receives, and the autocast dtype there."""
    calls: list[tuple[Tensor, torch.dtype | None]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append((args[0], head.autocast_dtype()))

    _seed(model)
    with pre_hook(head.linear, note):
        outputs = model(**inputs)
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs[0]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UnknownHead("its forward returns no loss")
    if len(calls) != 1:
        raise UnknownHead(f"its loss is made by {len(calls)} uses of its output embedding")
    return loss, *calls[0]


def _check_values(own: Tensor, expected: Tensor, logits: Tensor, head: Head) -> None:
    if not _is_near(own, expected, logits, head):
        raise UnknownHead(
            f"its own loss is not the cross entropy of next tokens ({float(own):.5g} instead of {float(expected):.5g} on a few "
            "random tokens): a term is added to it, or its labels are not shifted"
        )


def _is_near(own: Tensor, expected: Tensor, logits: Tensor, head: Head) -> bool:
    """Whether two losses of the same logits are equal up to rounding.

    The model may round its loss to its own dtype. The products of a sharded head are summed in another order.
    """
    relative = 1e-4 if own.dtype == torch.float32 else 4 * torch.finfo(own.dtype).eps
    tolerance = relative * expected.detach().abs() + 1e-6
    if is_sharded(head.linear.weight):
        tolerance = tolerance + torch.finfo(head.linear.weight.dtype).eps * logits.detach().abs().max()
    own, expected = own.detach().float().reshape(()).to(expected.device), expected.detach()
    return bool(((own - expected).abs() <= tolerance) | (own.isnan() & expected.isnan()))


def _check_weights(model: nn.Module, own: Tensor, reached: Tensor, expected: Tensor) -> None:
    """Check that both losses train the same weights, since a term that is zero now does not change the value."""
    in_own, in_ours = _leaves(own), _leaves(expected) | _leaves(reached)
    names = [name for name, weight in model.named_parameters() if id(weight) in in_own and id(weight) not in in_ours]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UnknownHead(f"its own loss also trains {names[0]}{more}")


def _leaves(tensor: Tensor) -> set[int]:
    """Ids of the leaf tensors that backward would reach."""
    leaves: set[int] = set()
    visited, waiting = set(), [tensor.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):  # only AccumulateGrad has it
            leaves.add(id(node.variable))
        waiting += [next_node for next_node, _ in node.next_functions]
    return leaves


def _are_alike(first: Tensor, second: Tensor) -> bool:
    """Whether two results of the same kernels on the same numbers are equal; on a GPU they may be summed in another order."""
    if first.shape != second.shape:
        return False
    first, second = first.detach().float(), second.detach().float()
    difference = (first - second).nan_to_num().norm()
    tolerance = 64 * torch.finfo(torch.bfloat16).eps * second.nan_to_num().norm()
    return bool(difference <= tolerance) and torch.equal(first.isfinite(), second.isfinite())


def trial_batch(model: PreTrainedModel, head: Head) -> dict[str, Tensor]:
    """`input_ids` of random tokens and `labels` of other random tokens, int64 of shape (2, positions)."""
    embedding: Any = model.get_input_embeddings()
    vocabulary, rows = head.linear.weight.shape[0], embedding.weight.shape[0]
    settings = {**vars(model.config), **vars(model.config.get_text_config())}
    # Multimodal models number the tokens for images and sounds above those of text, or name them in the config.
    named = {name: value for name, value in settings.items() if "token_id" in name or "token_index" in name}
    special = {value for value in named.values() if type(value) is int}
    plain = torch.tensor([token for token in range(min(vocabulary, rows, 4096) // 2) if token not in special] or [0])
    generator = torch.Generator().manual_seed(0)
    ids, labels = plain[torch.randint(len(plain), (2, _ROWS, _POSITIONS), generator=generator)]
    pad = settings.get("pad_token_id")
    if isinstance(pad, int) and 0 <= pad < vocabulary:
        labels[0, 4] = pad  # a loss may leave it out
    for row, positions in enumerate(_UNLABELLED):
        labels[row, list(positions)] = IGNORED_LABEL
    return {"input_ids": ids.to(model.device), "labels": labels.to(model.device)}


def small_part(batch: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """The first tokens of the first rows of a batch, with the `labels` of a trial batch."""
    target = batch["shift_labels"] if batch.get("labels") is None else batch["labels"]
    rows, positions = target.shape
    kept_rows, kept = min(rows, _ROWS), min(positions, _POSITIONS)
    part: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows:
            value = value[:kept_rows]
            if value.ndim > 1 and value.shape[1] == positions:
                value = value[:, :kept]
            if value.ndim == 4 and value.shape[2:] == (positions, positions):
                value = value[..., :kept, :kept]
        part[name] = value
    for name in ("labels", "shift_labels"):
        if part.get(name) is not None:
            part[name] = labels[:kept_rows, :kept].to(part[name])
    return part


def _seed(model: nn.Module) -> None:
    """Make two forwards draw the same dropout."""
    torch.default_generator.manual_seed(0)
    for device in accelerators_of(model):
        with torch.get_device_module(device).device(device):
            torch.get_device_module(device).manual_seed(0)
