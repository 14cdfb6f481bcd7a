"""The logits-free loss equals the plain loss: single calls against float64, real architectures against themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sbft.training.loss.cross_entropy import PIECE_ELEMENTS, linear_cross_entropy
from sbft.training.loss.head import Head, UnknownHead
from sbft.training.loss.head_trial import find_head
from sbft.training.loss.tied_embeddings import TiedEmbedding
from tests.tiny import KINDS, tiny_model

ROWS, VOCABULARY, HIDDEN = 24, 1000, 16


def _call(
    dtype: torch.dtype, requires_grad: bool = True, rows: int = ROWS, width: int = HIDDEN
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(VOCABULARY, width, generator=generator)
    bias = torch.randn(VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    labels[0], labels[1] = 0, VOCABULARY - 1
    return (*(t.to(dtype).requires_grad_(requires_grad) for t in (hidden, weight, bias)), labels)


def _oracle(
    scale: float, softcap: float | None, num_items: float, like: tuple[torch.Tensor, ...]
) -> list[torch.Tensor]:
    hidden, weight, bias = (t.detach().double().requires_grad_() for t in like[:3])
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, like[3], reduction="sum") / num_items
    return [loss, *torch.autograd.grad(loss, (hidden, weight, bias))]


@pytest.mark.parametrize("piece_elements", [ROWS * VOCABULARY, ROWS * 300, 1])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 5.0), (2.0, 7.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_match_float64(
    dtype: torch.dtype, scale: float, softcap: float | None, piece_elements: int
) -> None:
    hidden, weight, bias, labels = call = _call(dtype)
    loss = linear_cross_entropy(
        hidden, weight, labels, bias=bias, num_items=7.0, scale=scale, softcap=softcap, piece_elements=piece_elements
    )
    (3 * loss).backward()
    expected = _oracle(scale, softcap, 7.0, call)
    # bfloat16: the logits are rounded once (8 bits), and so is their gradient; norms, because errors are independent.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected[0].item()) <= tolerance * abs(expected[0].item())
    for found, reference in zip((hidden.grad, weight.grad, bias.grad), expected[1:], strict=True):
        assert found is not None and found.dtype == dtype
        error = (found.double() - 3 * reference).norm() / (3 * reference).norm()
        assert error <= tolerance


@pytest.mark.parametrize("piece_elements", [ROWS * VOCABULARY, ROWS * 300, 1])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (2.0, 7.0)])
@pytest.mark.parametrize("num_items", [None, torch.tensor(11)])
def test_rows_that_do_not_count_change_nothing(
    num_items: torch.Tensor | None, scale: float, softcap: float | None, piece_elements: int
) -> None:
    hidden, weight, bias, labels = _call(torch.float32)
    counted = torch.arange(ROWS) % 3 != 1
    hidden = hidden.detach().masked_fill(~counted[:, None] & (torch.arange(HIDDEN) == 3), torch.inf).requires_grad_()
    few = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in (hidden[counted], weight, bias))
    expected = _oracle(scale, softcap, 16 if num_items is None else 11, (*few, labels[counted]))
    labels = labels.masked_fill(~counted, -100)
    loss = linear_cross_entropy(
        hidden, weight, labels, bias=bias, num_items=num_items, scale=scale, softcap=softcap, counted=counted,
        piece_elements=piece_elements,
    )  # fmt: skip
    (3 * loss).backward()
    assert abs(loss.item() - expected[0].item()) <= 1e-5 * abs(expected[0].item())
    assert hidden.grad is not None and not hidden.grad[~counted].any()
    for found, reference in zip((hidden.grad[counted], weight.grad, bias.grad), expected[1:], strict=True):
        assert found is not None and (found.double() - 3 * reference).norm() <= 1e-5 * (3 * reference).norm()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_of_every_position_give_the_loss_of_those_with_a_label(kind: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(kind)
    head = find_head(model)
    ids = torch.randint(0, 500, (2, 12))
    labels = ids.where(torch.rand(2, 12) < 0.5, -100)
    for settings in ({"every_position": True}, {"every_position": True, "num_items": torch.tensor(9)}):
        losses = [
            head.loss(model, {"input_ids": ids, "labels": labels}, **how)
            for how in ({**settings, "every_position": False}, settings)
        ]
        grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_of_a_wide_model_match_float64(dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = call = _call(dtype, rows=3, width=64)
    linear_cross_entropy(hidden, weight, labels, bias=bias, num_items=3.0).backward()
    expected = _oracle(1.0, None, 3.0, call)
    for found, reference in zip((hidden.grad, weight.grad, bias.grad), expected[1:], strict=True):
        assert found is not None and found.dtype == dtype
        assert (found.double() - reference).norm() / reference.norm() <= (1e-5 if dtype == torch.float32 else 2e-2)


def test_a_frozen_head_gets_no_gradient_buffer() -> None:
    hidden, weight, bias, labels = _call(torch.bfloat16)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, piece_elements=ROWS * 300)
    loss.backward()
    assert weight.grad is None and bias.grad is None and hidden.grad is not None


def test_num_items_may_be_a_tensor_and_no_label_at_all_is_a_loss_of_zero() -> None:
    hidden, weight, _, labels = _call(torch.float32)
    as_number = linear_cross_entropy(hidden, weight, labels, num_items=12)
    as_tensor = linear_cross_entropy(hidden, weight, labels, num_items=torch.tensor(12))
    assert as_number.item() == pytest.approx(as_tensor.item(), rel=1e-6)
    empty = linear_cross_entropy(hidden[:0], weight, labels[:0])
    empty.backward()
    assert empty.item() == 0 and weight.grad is not None and not weight.grad.any()


def test_no_tensor_of_all_logits_exists() -> None:
    hidden, weight, _, labels = _call(torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[:1] == (ROWS,):
                largest = max(largest, out.numel())
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, labels, piece_elements=ROWS * 300).backward()
    assert 0 < largest <= ROWS * 300


def test_autocast_decides_the_dtype_of_products() -> None:
    hidden, weight, _, labels = _call(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert loss.item() != linear_cross_entropy(hidden, weight, labels).item()


def _batch(vocabulary: int = 512) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (2, 12), generator=generator)
    labels = ids.clone()
    labels[0, :5], labels[1, 9:] = -100, -100
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_real_architectures_keep_their_loss_and_gradients(kind: str, tied: bool, dtype: torch.dtype) -> None:
    model = tiny_model(kind, tied=tied, dtype=dtype).train()
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    head = find_head(model)
    assert head.softcap == (30.0 if kind == "gemma3" else None)
    _keeps_loss_and_gradients(model, head, _batch(), 20, 1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("tied", [True, False])
def test_gemma3_with_its_large_vocabulary_is_cut_into_slices(tied: bool) -> None:
    vocabulary, positions = 262_144, 72
    assert vocabulary * (positions - 1) > PIECE_ELEMENTS
    model = tiny_model("gemma3", tied=tied, vocab=vocabulary, layers=1).train()
    ids = torch.randint(3, vocabulary, (1, positions), generator=torch.Generator().manual_seed(0))
    _keeps_loss_and_gradients(model, find_head(model), {"input_ids": ids, "labels": ids}, positions - 1, 3e-2)


def _keeps_loss_and_gradients(
    model: nn.Module, head: Head, batch: dict[str, torch.Tensor], items: int, tolerance: float
) -> None:
    plain = model(**batch, num_items_in_batch=items).loss
    plain.backward()
    expected = _gradients(model)
    with TiedEmbedding(model, head) as tied_pair:
        loss = head.loss(model, batch, items, weight=tied_pair.head_weight())
        loss.backward()
    found = _gradients(model)
    assert loss.item() == pytest.approx(plain.item(), rel=tolerance)
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        assert (found[name] - reference).norm() <= tolerance * reference.norm(), name


@pytest.mark.parametrize("family", ["Cohere", "Granite"])
def test_factors_on_the_logits_are_understood(family: str) -> None:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **({"logit_scale": 0.125} if family == "Cohere" else {"logits_scaling": 8.0}),
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    head = find_head(model)
    assert head.scale == 0.125
    batch = _batch(64)
    assert head.loss(model, batch).item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_logits_made_in_an_unknown_way_are_found_out() -> None:
    class Squared(type(tiny_model())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + 1 + out.logits.square() / 100
            return out

    model = Squared(tiny_model().config)
    with pytest.raises(UnknownHead, match="scaled and capped"):
        find_head(model)
    wrapped = tiny_model()
    wrapped.set_output_embeddings(nn.Sequential(wrapped.get_output_embeddings()))
    with pytest.raises(UnknownHead, match="Sequential"):
        find_head(wrapped)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model().train()
    head = find_head(model)
    with TiedEmbedding(model, head) as tied_pair:
        head.loss(model, _batch(), weight=tied_pair.head_weight())
    assert model.training
    assert not model.get_input_embeddings().sparse
    assert not head.linear._forward_pre_hooks


def test_a_tied_embedding_makes_no_second_table_of_gradients() -> None:
    model = tiny_model("llama", tied=True).train()
    head = find_head(model)
    tables = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal tables
            out = func(*args, **(kwargs or {}))
            fresh = not any(name in str(func) for name in ("add_", "t.default", "detach", ".out"))
            if isinstance(out, torch.Tensor) and not out.is_sparse and out.shape == head.linear.weight.shape:
                tables += fresh
            return out

    with TiedEmbedding(model, head) as tied_pair:
        loss = head.loss(model, _batch(), weight=tied_pair.head_weight())
        with Watch():
            loss.backward()
    assert model.get_input_embeddings().weight.grad is not None
    assert tables == 1


def test_lora_goes_through_the_wrapper_and_leaves_the_head_frozen() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama", dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).train()
    head = find_head(wrapped)
    assert head.loss(wrapped, _batch()).item() == pytest.approx(wrapped(**_batch()).loss.item(), rel=1e-5)
    with TiedEmbedding(wrapped, head) as tied_pair:
        head.loss(wrapped, _batch(), weight=tied_pair.head_weight()).backward()
    assert head.linear.weight.grad is None
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora" in n)


def test_a_tied_embedding_adds_up_over_micro_batches() -> None:
    model = tiny_model("llama", tied=True, dtype=torch.float32)
    head = find_head(model)
    (2 * head.loss(model, _batch())).backward()
    expected = _gradients(model)
    with TiedEmbedding(model, head) as tied_pair:
        for _ in range(2):
            head.loss(model, _batch(), weight=tied_pair.head_weight()).backward()
    for name, found in _gradients(model).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-7)
