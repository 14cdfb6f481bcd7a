"""What steps as CUDA graphs hold beside the tensors of a step that is launched kernel by kernel."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from sbft.planning.memory.step import StepShape
from sbft.recipe import Recipe
from sbft.training.graphs.graphed_training import padded_length

_BYTES_PER_TOKEN = 16
"""A graph's own copy of a batch: `input_ids` and `labels`, int64. The copies of shorter lengths are not counted."""


def as_graphs(recipe: Recipe, device: str) -> bool:
    """Whether a recipe's steps are launched as graphs on this type of device."""
    return device == "cuda" and bool(recipe.optimizer.cuda_graphs)


def shape_in_graph(shape: StepShape, *, whole: bool) -> StepShape:
    """The batch as a graph takes it: without a mask, padded to one of few lengths, with logits at every position.

    Args:
        shape: of the batch that the collator makes.
        whole: whether all rows have this length and a label at every position, as in pretraining; these stay as they are.
    """
    tokens = shape.tokens if whole else padded_length(shape.tokens)
    return replace(shape, tokens=tokens, labelled=shape.batch_size * (tokens - 1), padded=False)


def static_bytes(shape: StepShape) -> int:
    """Bytes of a graph's own copy of its batch."""
    return _BYTES_PER_TOKEN * shape.batch_size * shape.tokens


def pool_bytes_of_graphs(parts: Counter[str]) -> int:
    """What the graphs' memory pool reserves beyond what is allocated: about the tensors of a step again.

    Memory that the plain steps before the first capture leave in torch's cache cannot serve a graph. On an H100, torch
    reserved 1.2, 1.6, 1.6 and 1.7 times what it allocated at batch 1, 4, 16 and 64 (benchmarks/lab/results/h100-small).
    """
    return parts["activations"] + parts["logits"]
