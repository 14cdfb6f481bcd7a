"""Tries on the model itself whether its loss is what is taken from its head: no class says what its forward does besides.

A forward may scale or cap its logits, add a term, not shift its labels, make of them the inputs of a decoder, or call its head
twice. All of it shows on a few tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sbft.data.collate import IGNORED_LABEL
from sbft.optim.sharding import is_sharded, whole

if TYPE_CHECKING:
    from sbft.training.loss.head import Head

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule

_ROWS, _POSITIONS = 2, 6
# Rows differ in how many labels they have, so that a mean of means shows.
_IGNORED = ((0, 3), (2, 4, 5))
_SMALL_BUFFER = 2**16


class Otherwise(Exception):
    """A model does otherwise than its head lets expect; the message says how."""


class NotTaken(Otherwise):
    """A model cannot be tried."""


def head_that_makes_the_logits(model: nn.Module, heads: list[Head], ids: Tensor) -> Head:
    """The one of `heads` that makes of large random hidden states the logits which the model itself makes of them.

    Args:
        ids: (1, positions), any tokens.

    Raises:
        Otherwise: if none does.
    """
    linear = heads[0].linear
    generator = torch.Generator().manual_seed(0)
    weight = whole(linear.weight.detach())
    probe = torch.randn(ids.shape[1], linear.in_features, generator=generator).to(weight)
    # Raw logits of 60 and more: a soft cap or a factor that was overlooked shows.
    probe = probe * (60.0 / F.linear(probe, weight).float().std().clamp(min=1e-6)).to(probe)
    autocast_dtypes: list[torch.dtype | None] = []

    def inject(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        autocast_dtypes.append(heads[0].autocast_dtype())
        return (probe.unsqueeze(0),)

    with left_as_it_was(model, training=False), torch.no_grad():
        with _taken(), pre_hook(linear, inject):
            found = model(input_ids=ids, use_cache=False).logits
        if not autocast_dtypes:
            raise Otherwise("its logits are made without its output embedding")
        for head in heads:
            with head.autocast(autocast_dtypes[0]):
                expected = head.logits(probe.unsqueeze(0))
            dtype = autocast_dtypes[0] or weight.dtype
            if found.shape == expected.shape and _within_roundings(found.float(), expected, dtype):
                return head
    raise Otherwise("its logits are not those of its head, scaled and capped as its config says")


def _within_roundings(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    # Up to four roundings in `dtype` (product, factor, cap, tanh), of numbers up to the largest logit.
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max()
    return bool((found - expected).abs().max() <= tolerance)


def check_loss(model: nn.Module, head: Head, batch: dict[str, Any], *, with_num_items: bool) -> None:
    """Compares the model's own loss of a small batch with what `head` makes of it.

    In training mode, where a model may add what it leaves out in evaluation; in evaluation mode if it takes no such batch in
    training.

    Args:
        batch: with `labels`, as `trial_batch` or `small_part` makes one.
        with_num_items: whether the model is given the number of labels that its loss is divided by.

    Raises:
        Otherwise: if they differ, or if the model does not take the batch.
    """
    try:
        with left_as_it_was(model, training=True), _taken():
            _compare(model, head, batch, with_num_items)
    except NotTaken:
        with left_as_it_was(model, training=False), _taken():
            _compare(model, head, batch, with_num_items)


@contextmanager
def _taken() -> Iterator[None]:
    try:
        yield
    except (Otherwise, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a forward of anyone's, given what it may not be made for
        said = str(error).partition("\n")[0]
        raise NotTaken(f"it does not take a few tokens to be tried with ({type(error).__name__}: {said})") from error


def _compare(model: nn.Module, head: Head, batch: dict[str, Any], with_num_items: bool) -> None:
    targets = {name: batch[name] for name in ("labels", "shift_labels") if batch.get(name) is not None}
    rest = {**{name: value for name, value in batch.items() if name not in targets}, "use_cache": False}
    following = targets["shift_labels"] if "shift_labels" in targets else targets["labels"][:, 1:]
    items = (following != IGNORED_LABEL).sum() * (3 if with_num_items else 1)
    seen: list[tuple[Tensor, torch.dtype | None]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append((args[0], head.autocast_dtype()))

    # FSDP2 gets ready for a backward that would not come.
    with torch.set_grad_enabled(not any(map(is_sharded, model.parameters()))):
        _seed(model)
        with pre_hook(head.linear, note):
            outputs = model(**rest, **targets, **({"num_items_in_batch": items} if with_num_items else {}))
        own = outputs.get("loss") if isinstance(outputs, dict) else outputs[0]
        if not isinstance(own, Tensor) or own.numel() != 1:
            raise Otherwise("its forward gives no loss")
        if len(seen) != 1:
            raise Otherwise(f"its loss is made by {len(seen)} uses of its output embedding")
        hidden, autocast_dtype = seen[0]
        _seed(model)
        reached = head.hidden_states(model, rest)
        shard_again(model)
        if not _are_alike(reached, hidden):
            raise Otherwise("what reaches its output embedding depends on the labels")
        with head.autocast(autocast_dtype):
            logits = head.logits(hidden.detach())
        if "shift_labels" not in targets:
            logits = logits[:, :-1]
        if logits.shape[:2] != following.shape:
            raise Otherwise("it makes more or fewer hidden states than there are tokens")
        expected = F.cross_entropy(logits.flatten(0, 1), following.flatten().to(logits.device), reduction="sum") / items
        if with_num_items and _is_near(own, 3 * expected, logits, head):
            raise Otherwise("it is given num_items_in_batch, and does not divide its loss by it")
        _check_values(own, expected, logits, head)
        _check_weights(model, own, reached, expected)


def _check_values(own: Tensor, expected: Tensor, logits: Tensor, head: Head) -> None:
    if not _is_near(own, expected, logits, head):
        raise Otherwise(
            f"its own loss is another than the cross entropy of next tokens ({float(own):.5g}, and {float(expected):.5g}, of "
            "a few random ones): a part is added to it, or its labels are not shifted"
        )


def _is_near(own: Tensor, expected: Tensor, logits: Tensor, head: Head) -> bool:
    """Of the same logits, of which the model may have rounded its loss; those of a head that is spread over ranks are summed in
    another order, and each may be rounded otherwise."""
    relative = 1e-4 if own.dtype == torch.float32 else 4 * torch.finfo(own.dtype).eps
    tolerance = relative * expected.detach().abs() + 1e-6
    if is_sharded(head.linear.weight):
        tolerance = tolerance + torch.finfo(head.linear.weight.dtype).eps * logits.detach().abs().max()
    own, expected = own.detach().float().reshape(()).to(expected.device), expected.detach()
    return bool(((own - expected).abs() <= tolerance) | (own.isnan() & expected.isnan()))


def _check_weights(model: nn.Module, own: Tensor, reached: Tensor, expected: Tensor) -> None:
    """A part that is zero, or a factor that is trained, does not show in the value."""
    trained, taken = _leaves(own), _leaves(expected) | _leaves(reached)
    names = [name for name, one in model.named_parameters() if id(one) in trained and id(one) not in taken]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise Otherwise(f"its own loss trains {names[0]}{more} besides")


def _leaves(tensor: Tensor) -> set[int]:
    """What backward would reach."""
    found: set[int] = set()
    nodes, waiting = set(), [tensor.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        if hasattr(node, "variable"):  # of AccumulateGrad alone
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return found


def _are_alike(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    found, expected = found.detach().float(), expected.detach().float()
    # The same kernels on the same numbers, which on a GPU may sum in another order.
    difference = (found - expected).nan_to_num().norm()
    tolerance = 64 * torch.finfo(torch.bfloat16).eps * expected.nan_to_num().norm()
    return bool(difference <= tolerance) and torch.equal(found.isfinite(), expected.isfinite())


def trial_batch(model: PreTrainedModel, head: Head) -> dict[str, Tensor]:
    """Two rows of random tokens, (2, positions), with labels that are others."""
    embedding: Any = model.get_input_embeddings()
    vocabulary, rows = head.linear.weight.shape[0], embedding.weight.shape[0]
    settings = {**vars(model.config), **vars(model.config.get_text_config())}
    # Multimodal models keep the tokens that stand for images and sounds above those of text, or name them.
    named = {value for name, value in settings.items() if ("token_id" in name or "token_index" in name) and type(value) is int}
    plain = torch.tensor([token for token in range(min(vocabulary, rows, 4096) // 2) if token not in named] or [0])
    generator = torch.Generator().manual_seed(0)
    ids, labels = plain[torch.randint(len(plain), (2, _ROWS, _POSITIONS), generator=generator)]
    pad = settings.get("pad_token_id")
    if isinstance(pad, int) and 0 <= pad < vocabulary:
        labels[0, 4] = pad  # which a loss may ignore
    for row, positions in enumerate(_IGNORED):
        labels[row, list(positions)] = IGNORED_LABEL
    return {"input_ids": ids.to(model.device), "labels": labels.to(model.device)}


def small_part(batch: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """The first tokens of a batch's first row, or a few more; `labels` are taken from a trial batch."""
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


def shard_again(model: nn.Module) -> None:
    """After a forward that no backward follows FSDP2 keeps some weights whole, in the place of the sharded ones."""
    if torch.distributed.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextmanager
def pre_hook(module: nn.Module, hook: Any) -> Iterator[None]:
    """`hook` before each forward of `module`, within."""
    handle: RemovableHandle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def left_as_it_was(model: nn.Module, training: bool) -> Iterator[None]:
    """Forwards in one mode that leave no trace: in the modules' modes, in random numbers, in what they count, in FSDP2."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(one, one.clone()) for one in model.buffers() if one.numel() <= _SMALL_BUFFER and not is_sharded(one)]
    devices = _accelerators(model)
    try:
        with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
            model.train(training)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for one, before in buffers:
                if not torch.equal(one, before):
                    one.copy_(before)
        shard_again(model)


def _accelerators(model: nn.Module) -> list[torch.device]:
    return [*{one.device for one in model.parameters() if one.device.type not in ("cpu", "meta")}]


def _seed(model: nn.Module) -> None:
    """The same dropout again."""
    torch.default_generator.manual_seed(0)
    for device in _accelerators(model):
        with torch.get_device_module(device).device(device):
            torch.get_device_module(device).manual_seed(0)
