"""The planner's trace on the meta device matches real code: storages, the heap under them, a step, optimizer states."""

from __future__ import annotations

import ctypes
import json
import os
import random
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from sbft.data.collate import Collator
from sbft.native.memory import optimizer_state_bytes
from sbft.optim import SGD, Adafactor, AdamW
from sbft.planning.memory.attention import attention_on
from sbft.planning.memory.heap import Heap, PooledHeap
from sbft.planning.memory.step import LOSS, StepShape, trace_step
from sbft.planning.memory.trace import AllocationTrace
from sbft.recipe import Recipe, load_recipe, resolve
from sbft.recipe.methods import METHODS
from sbft.runs.build import DTYPES, make_trainable, prepare_model, training_arguments
from sbft.training.loss.head import UnknownHead, head_candidates
from sbft.training.peft_models import unwrap
from sbft.training.plain_attention import PLAIN_ATTENTION_TOKENS
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import save_tiny, tiny_model

KIB, MIB = 2**10, 2**20
FIRST, SECOND = ("first", None), ("second", None)


def resolved(method: str, *overrides: str, model: str = "random:tiny") -> Recipe:
    return resolve(load_recipe(None, list(overrides), model=model, method=method, data="generated:random_text"))


# Storages


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_replayed_is_traced_as_if_it_ran_again(device: str) -> None:
    runs: list[int] = []

    def code(left: Tensor) -> None:
        runs.append(1)
        product = left @ left
        del product
        torch.empty(100_000).sum()

    def traced(*, replays: bool) -> tuple[list[Any], int, set[Any], int | None]:
        with torch.device("meta"), AllocationTrace(device) as trace:
            trace.phase = FIRST
            left = torch.empty(256, 256, dtype=torch.bfloat16)
            for _ in range(3):
                trace.replay("test", lambda: code(left)) if replays else code(left)
            right = left + 1
            trace.label([right], "activations")
            heap = None if trace.heap is None else trace.heap.peak_bytes
            return list(trace.peaks().items()), trace.count, set(trace.products), heap

    assert traced(replays=True) == traced(replays=False)
    assert len(runs) == 1 + 3
    assert traced(replays=True) == traced(replays=False)  # recorded by a trace that no longer exists
    assert len(runs) == 1 + 3 + 3


def test_code_that_frees_what_it_did_not_allocate_is_not_replayed() -> None:
    with torch.device("meta"), AllocationTrace("cpu") as trace:
        kept = [torch.empty(1024)]
        with pytest.raises(AssertionError, match="freed"):
            trace.replay("frees", kept.clear)


def test_each_phase_has_its_own_peak_of_what_lives() -> None:
    with torch.device("meta"), AllocationTrace("cpu") as trace:
        trace.phase = FIRST
        a = torch.empty(1024)  # 4 KiB
        b = a + 1
        del a
        trace.phase = SECOND
        c = torch.empty(2048, dtype=torch.bfloat16)  # 4 KiB
        d = b * 2
        del b, c
        e = torch.empty(256, dtype=torch.int64)  # 2 KiB
        del d, e
    peaks = trace.peaks()
    assert peaks == {FIRST: {"workspace": 8 * KIB}, SECOND: {"workspace": 12 * KIB}}
    assert trace.count == 5 and trace.events == 10


def test_views_and_updates_in_place_are_no_new_storage() -> None:
    with torch.device("meta"), AllocationTrace("cpu") as trace:
        trace.phase = FIRST
        a = torch.empty(64, 16)
        view, transposed, same = a[:3], a.T, a.detach()
        a.add_(1).mul_(2)
        transposed.contiguous()  # a copy, freed at once
        parts = a.split(16)
    assert trace.peaks() == {FIRST: {"workspace": 2 * 4 * KIB}}
    assert trace.count == 2 and trace.events == 3
    del a, transposed, same, parts
    assert trace.events == 3  # a view keeps the whole storage
    del view
    assert trace.events == 4


def test_a_phase_begins_with_what_is_held_and_may_begin_anew() -> None:
    with torch.device("meta"), AllocationTrace("cpu") as trace:
        held = torch.empty(256)
        trace.phase = FIRST
        torch.empty(1024)
        since = trace.events
        torch.empty(512)
        trace.phase = SECOND
        torch.empty(16)
    assert trace.peaks()[FIRST].total() == 5 * KIB
    assert trace.peaks(since)[FIRST].total() == 3 * KIB
    assert trace.peaks(since)[SECOND].total() == held.untyped_storage().nbytes() + 64


def test_labels_hold_for_all_of_a_storages_life_and_the_last_word_counts() -> None:
    with torch.device("meta"), AllocationTrace("cpu") as trace:
        trace.phase = FIRST
        a = torch.empty(256)
        before = trace.count
        b, c = torch.empty(512), torch.empty(1024)
        trace.label([a[:1]], "weights")  # through a view of it
        trace.label([c], "logits")
        trace.label([c], "gradients")
        trace.label_unknown("activations", since=before)
        trace.phase = SECOND
        d = torch.empty(2048)
        trace.label_born_in(FIRST, "wrong")  # all of these already have labels
        trace.label_born_in(SECOND, "late")
    assert trace.peaks()[FIRST] == {"weights": 1 * KIB, "activations": 2 * KIB, "gradients": 4 * KIB}
    assert trace.peaks()[SECOND] == {"weights": 1 * KIB, "activations": 2 * KIB, "gradients": 4 * KIB, "late": 8 * KIB}
    del a, b, c, d


@pytest.mark.parametrize(("device", "block"), [("cpu", 64), ("cuda", 512)])
def test_sizes_are_rounded_up_as_by_the_devices_allocator(device: str, block: int) -> None:
    with torch.device("meta"), AllocationTrace(device) as trace:
        trace.phase = FIRST
        held = [torch.empty(n, dtype=torch.uint8) for n in (1, 63, 64, 65, 511, 512, 513)]
    expected = {64: 64 + 64 + 64 + 128 + 512 + 512 + 576, 512: 6 * 512 + 1024}[block]
    assert trace.peaks()[FIRST].total() == expected
    assert (trace.heap is None) == (device == "cuda") and len(held) == 7


def test_products_of_bfloat16_are_counted_once_for_each_shape() -> None:
    half = {"dtype": torch.bfloat16}
    with torch.device("meta"), AllocationTrace("cpu") as trace:
        trace.phase = FIRST
        weight = torch.empty(32, 16, **half)
        for rows in (4, 8, 4):
            torch.empty(rows, 16, **half) @ weight.T
        trace.phase = SECOND
        torch.mm(torch.empty(8, 32, **half), weight, out=torch.empty(8, 16, **half))
        nn.functional.linear(torch.empty(4, 16, **half), weight, torch.empty(32, **half))  # the first one's shapes
        torch.empty(3, 4, 16, **half) @ torch.empty(3, 16, 4, **half)
        torch.empty(4, 16) @ torch.empty(16, 4)  # float32 takes another path
        torch.empty(0, 16, **half) @ weight.T
    assert list(trace.products.values()) == ["first", "first", "second", "second"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_of_grouped_queries_holds_what_the_cpus_kernel_holds(dtype: torch.dtype, masked: bool) -> None:
    tokens, heads, groups = PLAIN_ATTENTION_TOKENS + 16, 6, 2

    def held(attention: Callable[..., Tensor], device: str) -> Counter[str]:
        sizes = [(1, n, tokens, 64) for n in (heads, groups if not masked else heads, groups if not masked else heads)]
        tensors = [torch.empty(size, dtype=dtype, device=device).requires_grad_() for size in sizes]
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device) if masked else None
        with AllocationTrace("cpu") as trace:
            trace.phase = FIRST
            result = attention(*tensors, attn_mask=mask, is_causal=not masked, enable_gqa=not masked)
        kept = trace.peaks()[FIRST]
        assert result.grad_fn is not None
        return kept

    real = held(nn.functional.scaled_dot_product_attention, "cpu")
    assert held(attention_on("cpu", tokens), "meta") == real and real.total() > 0


@pytest.mark.parametrize(
    ("dtype", "groups", "whole_rows"), [(torch.bfloat16, 2, False), (torch.float32, 2, True), (torch.float32, 6, False)]
)
def test_on_cuda_grouped_queries_in_float32_keep_the_probabilities(
    dtype: torch.dtype, groups: int, whole_rows: bool
) -> None:
    tokens, heads = 512, 6
    query = torch.empty(1, heads, tokens, 64, dtype=dtype, device="meta", requires_grad=True)
    key, value = (torch.empty(1, groups, tokens, 64, dtype=dtype, device="meta", requires_grad=True) for _ in "kv")
    with AllocationTrace("cuda") as trace:
        trace.phase = FIRST
        result = attention_on("cuda", tokens)(query, key, value, is_causal=True, enable_gqa=groups < heads)
    assert result.shape == query.shape
    assert (trace.peaks()[FIRST].total() >= 4 * heads * tokens * tokens) is whole_rows


def test_experts_may_get_any_number_of_rows() -> None:
    with torch.device("meta"), AllocationTrace("cpu") as trace:
        rows, experts = torch.empty(40, 16, dtype=torch.bfloat16), torch.empty(4, 16, 32, dtype=torch.bfloat16)
        for _ in range(2):  # layers
            torch._grouped_mm(rows, experts, offs=torch.empty(4, dtype=torch.int32))
    assert len(trace.products) == 40


def test_a_question_for_a_number_is_answered() -> None:
    with torch.device("meta"), AllocationTrace("cuda") as trace:
        trace.answer = 3
        assert torch.empty(()).sum().item() == 3
        trace.answer = 1
        assert bool(torch.empty(4).gt(0).all())
        trace.answer = 0
        assert not bool(torch.empty(4).gt(0).all())


def test_backward_is_traced_with_the_operations_that_no_python_calls() -> None:
    weight = torch.empty(64, 64, device="meta", requires_grad=True)
    with torch.device("meta"), AllocationTrace("cpu") as trace:
        trace.label([weight], "weights")
        trace.phase = FIRST
        loss = (torch.empty(8, 64) @ weight).exp().sum()
        trace.phase = SECOND
        loss.backward()
    # Kept: the input and the exponential, 8 x 64 floats each; in between, also the product inside the exponential.
    assert trace.peaks()[FIRST] == {"weights": 16 * KIB, "workspace": 3 * 2 * KIB}
    # The input, the exponential, the loss and its gradient, which is one; then the gradients of exponential and weight.
    assert weight.grad is not None
    assert trace.peaks()[SECOND] == {"weights": 16 * KIB, "workspace": 2 * 2 * KIB + 2 * 64 + 16 * KIB}


# The heap


Operations = list[tuple[int, int]]
"""A number and bytes: each operation allocates so many bytes under the number or, with 0 bytes, frees them."""


@st.composite
def operations(draw: st.DrawFn) -> Operations:
    sizes = st.one_of(st.integers(1, 2 * KIB), st.integers(1, 300 * KIB), st.integers(1, 40 * MIB))
    chosen: Operations = []
    live: list[int] = []
    for number in range(draw(st.integers(1, 40))):
        while live and draw(st.booleans()):
            chosen.append((live.pop(draw(st.integers(0, len(live) - 1))), 0))
        chosen.append((number, draw(sizes)))
        live.append(number)
    return chosen


def play(heap: Heap, chosen: Operations) -> dict[int, int]:
    in_use: dict[int, int] = {}
    for number, size in chosen:
        if size:
            heap.allocate(number, size)
            in_use[number] = size
        else:
            heap.free(number)
            del in_use[number]
        assert heap.peak_bytes >= heap.resident_bytes >= sum(in_use.values())
        check_places(heap, in_use)
    return in_use


def check_places(heap: Heap, in_use: dict[int, int]) -> None:
    """Check that every allocation is as large as requested, and overlaps neither another one nor free memory."""
    assert heap._chunks.keys() == in_use.keys()
    assert all(heap._chunks[number][1] >= size for number, size in in_use.items())
    taken = [(start, start + size) for start, size in heap._chunks.values() if start >= 0]
    places = sorted(taken + list(heap._free_from.items()))
    assert all(before[1] <= after[0] for before, after in zip(places, places[1:], strict=False))
    assert all(end <= heap._top <= heap._end for _, end in places)
    assert sorted(heap._free_by_size) == sorted((end - start, start) for start, end in heap._free_from.items())
    assert heap._free_to == {end: start for start, end in heap._free_from.items()}


@settings(max_examples=25, deadline=None, database=None)
@given(operations())
def test_a_heap_never_overlaps_never_forgets_and_repeats_itself(chosen: Operations) -> None:
    first, second = Heap(), Heap()
    assert play(first, chosen) == play(second, chosen)
    assert (first.resident_bytes, first.peak_bytes) == (second.resident_bytes, second.peak_bytes)


@settings(max_examples=25, deadline=None, database=None)
@given(operations(), st.randoms(use_true_random=False))
def test_when_all_is_freed_it_keeps_no_more_than_is_not_worth_giving_back(
    chosen: Operations, order: random.Random
) -> None:
    heap = Heap(pinned=0.0)
    left = list(play(heap, chosen))
    order.shuffle(left)
    for number in left:
        heap.free(number)
    # Everything is one free piece at the top again; glibc keeps less of it than twice the largest mapped request.
    assert heap._top == 0 and not heap._free_from and not heap._chunks
    largest = max(size for _, size in chosen)
    assert heap.resident_bytes <= max(256 * KIB, 2 * (largest + 8 * KIB))


def test_a_freed_place_is_taken_again_and_a_large_one_goes_back_at_once() -> None:
    heap = Heap(pinned=0.0)
    heap.allocate(0, 100 * MIB)
    heap.free(0)
    assert heap.resident_bytes == 0 and heap.peak_bytes >= 100 * MIB
    for number in (1, 2, 3):
        heap.allocate(number, 64 * KIB)
    before = heap.resident_bytes
    heap.free(2)
    heap.allocate(4, 48 * KIB)  # into the gap
    assert heap.resident_bytes == before
    heap.allocate(5, 64 * KIB)  # the rest of the gap is too small
    assert heap.resident_bytes >= before + 64 * KIB


def test_a_pool_holds_the_most_that_was_in_use_beside_the_small_ones_of_a_heap() -> None:
    both, small = PooledHeap(), Heap()
    for heap in (both, small):
        for number in range(4):
            heap.allocate(number, 40 * KIB)
    for number, size in ((10, 64 * KIB), (11, MIB + 1), (12, 3 * MIB)):
        both.allocate(number, size)
    both.free(12)
    both.allocate(13, 2 * MIB)  # in the place that was freed
    both.free(2)
    both.free(99)  # never allocated
    assert both.peak_bytes == small.peak_bytes + 64 * KIB + MIB + 4 * KIB + 3 * MIB
    both.allocate(14, 2 * MIB)
    assert both.peak_bytes == small.peak_bytes + 64 * KIB + MIB + 4 * KIB + 4 * MIB


_MALLOC = textwrap.dedent(
    """
    import ctypes, json, sys
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in names]
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Info
    libc.free.argtypes = [ctypes.c_void_p]
    libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    chosen = json.loads(sys.stdin.read())
    places = (ctypes.c_void_p * len(chosen))()
    held = (ctypes.c_size_t * (len(chosen) + 1))()
    def hold(i):
        info = libc.mallinfo2()
        held[i] = info.arena + info.hblkhd
    hold(0)
    for i, (number, size) in enumerate(chosen):
        if size:
            assert libc.posix_memalign(ctypes.byref(places, 8 * number), 64, size) == 0
        else:
            libc.free(places[number])
        hold(i + 1)
    print(json.dumps(list(held)))
    """
)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="mallinfo2 of glibc"
)
def test_the_heap_holds_what_glibcs_malloc_holds() -> None:
    generator = random.Random(5)
    # The first request raises the threshold above which requests are mapped, in both; one other is still above it.
    chosen: Operations = [(0, 8 * MIB), (0, 0), (1, 20 * MIB)]
    live: list[int] = []
    for number in range(2, 60):
        chosen.append((number, generator.randrange(300, 3000) * KIB))
        live.append(number)
        if len(live) > 6:
            chosen.append((live.pop(generator.randrange(len(live))), 0))
    chosen += [(number, 0) for number in [1, *live]]
    # Without glibc's caches of small pieces: otherwise some pieces beside aligned requests would happen to stay in use.
    tunables = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-S", "-c", _MALLOC],
        input=json.dumps(chosen),
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "GLIBC_TUNABLES": tunables},
    )
    held = json.loads(done.stdout)
    heap = Heap(pinned=0.0)
    for (number, size), real in zip(chosen, held[1:], strict=True):
        if size:
            heap.allocate(number, size)
        else:
            heap.free(number)
        # The heap grows with a pad of 128 KiB, and Python's own heap ended somewhere within one.
        assert abs(real - held[0] - heap.resident_bytes) <= 2 * 132 * KIB, (number, size)


# A step


class Holding(TorchDispatchMode):
    """Holds weak references to all storages of real tensors, and counts them whenever there may be a new peak."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.peak_bytes = 0
        self._at_most_bytes = 0  # includes what was freed since the last count
        self._held: dict[int, tuple[StorageWeakRef, int, int]] = {}  # by address: reference, bytes, number

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(one, Tensor):
                self.add(one)
        if self._at_most_bytes > self.peak_bytes:
            self.peak_bytes = max(self.peak_bytes, self.held_bytes())
        return result

    def add(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:  # the gradient of a sparse embedding
            self.add(tensor._indices())
            self.add(tensor._values())
            return
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in self._held or self._held[reference.cdata][0].expired():
            self._held[reference.cdata] = (reference, in_blocks(storage.nbytes()), self.count)
            self.count += 1
            self._at_most_bytes += in_blocks(storage.nbytes())

    def held_bytes(self, since: int = 0) -> int:
        for address in [address for address, (reference, *_) in self._held.items() if reference.expired()]:
            del self._held[address]
        self._at_most_bytes = sum(size for _, size, _ in self._held.values())
        return sum(size for _, size, number in self._held.values() if number >= since)


def in_blocks(size: int) -> int:
    return -(-size // 64) * 64


def storages_in_blocks(tensors: list[Tensor]) -> int:
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(map(in_blocks, sizes.values()))


class MeasuredTrainer(SmallBatchTrainer):
    """Measures its last step."""

    holding: Holding

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        assert self.optimizer is not None and isinstance(self.model, nn.Module)
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        self.state_bytes = storages_in_blocks([value for value in states if isinstance(value, Tensor)])
        weights = storages_in_blocks([*self.model.parameters(), *self.model.buffers()])
        self.beside_bytes = self.holding.held_bytes() - weights - self.state_bytes
        self.holding.peak_bytes = 0
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        born = self.holding.count

        def at_head(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.activation_bytes = self.holding.held_bytes(born) + storages_in_blocks(list(inputs.values()))

        base: Any = unwrap(model)
        handle = base.get_output_embeddings().register_forward_pre_hook(at_head)
        loss = super().training_step(model, inputs, *args, **kwargs)
        handle.remove()
        return loss


def train(recipe: Recipe, config: PreTrainedConfig, tokens: int, folder: Path) -> MeasuredTrainer:
    """Train two steps in this process; the second is measured."""
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[str(recipe.dtype)])
    model = make_trainable(model, recipe)
    ids = [[3 + i % 50 for i in range(tokens)]] * 8
    trainer = MeasuredTrainer(
        model=model,
        args=training_arguments(recipe, folder),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        data_collator=Collator(2),
    )
    with Holding() as trainer.holding:
        for tensor in [*model.parameters(), *model.buffers()]:
            trainer.holding.add(tensor)
        trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("method", "tied", "checkpointing", "tokens"),
    [
        ("sbft", True, False, 64),
        ("sbft", True, True, 300),
        ("sbft", False, False, 300),
        ("adam", False, True, 64),
        ("adam-accum", False, False, 300),
        ("lora", True, True, 300),
        ("hf-adafactor", False, False, 64),
        ("muon", False, False, 64),
        # With sliced gradients of embeddings and head, by default (up to 16 labels) and on request.
        ("sbft", True, False, 16),
        ("sbft", False, True, 16),
        ("sgd", False, False, 16),
        ("sbft sliced", True, False, 64),
        ("sbft sliced", False, False, 64),
        ("sbft sliced", False, False, 300),
        ("sbft whole", True, False, 16),
        ("sbft whole", False, False, 16),
    ],
)
def test_a_traced_step_holds_what_the_trainer_holds(
    tmp_path: Path, method: str, tied: bool, checkpointing: bool, tokens: int
) -> None:
    pytest.importorskip("peft")
    accumulation = 2 if method == "adam-accum" else 1
    method, *slices = method.split()
    recipe = resolved(
        method,
        *(f"optimizer.sliced_vocabulary={str(word == 'sliced').lower()}" for word in slices),
        "training.max_steps=2",
        f"training.gradient_accumulation_steps={accumulation}",
        f"training.gradient_checkpointing={str(checkpointing).lower()}",
    )
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied,
    )  # fmt: skip
    trainer = train(recipe, config, tokens, tmp_path)
    length = -(-tokens // 16) * 16  # as the collator pads
    shape = StepShape(batch_size=1, tokens=length, labelled=tokens - 1, padded=length > tokens)
    traced = trace_step(recipe, config, shape, "cpu", checkpointing=checkpointing)

    scalars = 1 * KIB  # the trainer's own: running loss, whether it is finite, number of labels; 64 bytes each
    assert traced.phases[LOSS]["activations"] == pytest.approx(trainer.activation_bytes, abs=scalars)
    batch = 3 * 8 * length  # ids, mask and labels, int64
    # Besides what is traced, the trainer holds the positions at which it watches weights for changes and, when it begins,
    # the last batches and the next. The trace has one batch in each pass; the trainer has all of a step, and the next.
    assert trainer.beside_bytes <= 8 * 512 * 8 + (accumulation + 1) * batch + scalars
    peak = max(phase.total() for phase in traced.phases.values())
    expected = trainer.holding.peak_bytes - trainer.beside_bytes
    assert peak == pytest.approx(expected, abs=2 * batch + scalars)
    # A state that is created on demand is complete at the end of the first step.
    assert max(phase["optimizer_state"] for phase in traced.phases.values()) == trainer.state_bytes


# The state of optimizers


@pytest.mark.parametrize("method", METHODS)
def test_a_traced_optimizer_keeps_what_the_real_one_does(tmp_path: Path, method: str) -> None:
    if METHODS[method].missing_packages:
        pytest.skip(f"needs {', '.join(METHODS[method].missing_packages)}")
    folder = save_tiny(tmp_path / "model", hidden=128, layers=1, tied=False)
    recipe = resolved(method, "training.max_steps=1", "training.gradient_accumulation_steps=1", model=str(folder))
    model = prepare_model(recipe)
    config = unwrap(model).config
    ids = [list(range(3, 19))] * 16
    trainer = SmallBatchTrainer(
        model=model,
        args=training_arguments(recipe, tmp_path / "run"),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        data_collator=Collator(2),
    )
    trainer.train()
    assert trainer.optimizer is not None
    shape = StepShape(batch_size=1, tokens=16, labelled=15, padded=False)
    traced = trace_step(recipe, config, shape, "cpu", checkpointing=False)
    found = max(phase["optimizer_state"] for phase in traced.phases.values())
    # Each storage of the trace is rounded up to 64 bytes. bitsandbytes' two tables of 256 floats belong to no parameter.
    tables = 2 * KIB if METHODS[method].optimizer == "bitsandbytes_adamw8bit" else 0
    tensors = [v for state in trainer.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    rounding = storages_in_blocks(tensors) - optimizer_state_bytes(trainer.optimizer)
    assert found == optimizer_state_bytes(trainer.optimizer) - tables + rounding


@pytest.mark.parametrize("kind", [Adafactor, AdamW, SGD])
def test_a_state_can_be_made_before_the_first_update(kind: Any) -> None:
    states = []
    for early in (True, False):
        parameters = [nn.Parameter(torch.ones(shape)) for shape in ((128, 256), (64,))]
        optimizer = kind(parameters, **({"momentum_half_life": 100} if kind is SGD else {}))
        with pytest.raises(RuntimeError, match="tokens_per_step"):
            optimizer.initialize_state(parameters[0])
        optimizer.tokens_per_step = 10
        if early:
            for parameter in parameters:
                optimizer.initialize_state(parameter)
                assert optimizer.state[parameter] and torch.equal(parameter, torch.ones_like(parameter))
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.linspace(-1, 1 + i, parameter.numel()).view(parameter.shape)
        before = optimizer_state_bytes(optimizer)
        optimizer.step()
        assert before == (optimizer_state_bytes(optimizer) if early else 0)
        states.append([*parameters, *(value for p in parameters for value in optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True)) and len(states[0]) > 2


# The head without a trial


def test_the_head_is_guessed_without_running_the_model() -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was run")

    gemma = tiny_model("gemma3")
    gemma.forward = never
    (head,) = head_candidates(gemma)
    assert (head.linear, head.scale, head.softcap) == (gemma.get_output_embeddings(), 1.0, 30.0)
    llama = tiny_model("llama")
    llama.config.logits_scaling = 8.0
    assert [head.scale for head in head_candidates(llama)] == [8.0, 0.125, 1.0]
    llama.lm_head = nn.Sequential(nn.Linear(64, 512))
    with pytest.raises(UnknownHead, match="Sequential"):
        head_candidates(llama)
    with pytest.raises(UnknownHead, match="Linear is not a transformers model"):
        head_candidates(nn.Linear(2, 2))
