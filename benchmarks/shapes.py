"""Shapes of a model's parameters, without its weights."""

from __future__ import annotations

import re

import torch

from sbft.models.random_weights import ARCHITECTURES, random_config


def parameter_shapes(name: str) -> list[tuple[int, ...]]:
    """Shapes of a model of `sbft.models.random_weights`, of a folder with a config.json, or of one tensor: "4096x11008"."""
    if re.fullmatch(r"\d+(x\d+)*", name):
        return [tuple(int(size) for size in name.split("x"))]
    from transformers import AutoConfig, AutoModelForCausalLM

    config = random_config(name) if name in ARCHITECTURES else AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [tuple(parameter.shape) for parameter in model.parameters()]
