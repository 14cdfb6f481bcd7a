"""Whether a recipe's layers can be streamed from this machine's memory, by the model's config alone."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from sbft.errors import SbftError
from sbft.native.memory import available_bytes
from sbft.native.sizes import gib
from sbft.planning.check.finding import Finding
from sbft.planning.memory.skeleton import skeleton
from sbft.recipe import Recipe
from sbft.training.offload.layers import find_decoder, streamed_bytes, streamed_parameters

_TITLE = "The layers cannot be offloaded"


def why_not_streamed(recipe: Recipe, config: PreTrainedConfig) -> Finding | None:
    """What keeps the layers of a resolved recipe's model from being streamed; None if nothing does.

    Args:
        recipe: as `sbft.recipe.resolve` returns it.
        config: of its model.
    """
    offload = recipe.offloaded
    if offload is None:
        return None
    try:
        model = skeleton(recipe, config)
    except Exception:  # of the model's own code, of which loading it tells
        return None
    try:
        streamed = streamed_parameters(model, find_decoder(model), offload, recipe.lora is None)
    except SbftError as error:
        return Finding("cannot-be-offloaded", "error", _TITLE, str(error), "--set offload=null")
    needed, available = streamed_bytes(streamed), available_bytes(torch.device("cpu"))
    if needed <= available:
        return None
    largest = max(streamed_bytes({number: of_layer}) for number, of_layer in streamed.items())
    fewer = int(available // largest)
    return Finding(
        "host-memory-too-small",
        "error",
        _TITLE,
        f"{len(streamed)} layers take {gib(needed)} of the host's memory, and {gib(available)} are available.",
        f"--set offload='{{layers: {fewer}}}', if the device has room for the others; or --weights int8, which halves them."
        if fewer
        else "--weights int4, which takes 0.28 of the memory of bfloat16.",
    )
