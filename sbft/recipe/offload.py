"""Which layers of a model are in the host's memory: what the setting `offload` may be, and what it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ALL_LAYERS = "layers"
"""The setting's short form: all layers, activations on the device."""
EXPECTED = "layers, or keys such as {layers: 12, activations: true}, where layers is a number, all or auto"


@dataclass(frozen=True)
class Offload:
    """What `offload` asks for."""

    layers: int | Literal["all", "auto"] = "all"
    """How many of the decoder's layers are streamed; auto: as few as fit."""
    activations: bool = False
    """Whether the layers' inputs that checkpointing saves are in the host's memory too."""

    def streamed(self, layers: int) -> list[int]:
        """The numbers of the layers that are streamed, of `layers` in all.

        They are spread evenly, so that the arithmetic of a layer that stays hides the transfer of the next.
        """
        count = layers if isinstance(self.layers, str) else min(self.layers, layers)
        return [index * layers // count for index in range(count)]


def offload_of(value: Any) -> Offload | None:
    """What a value of `offload` asks for; None if nothing is offloaded.

    Args:
        value: None, "layers", or a mapping with the keys `layers` and `activations`.

    Raises:
        ValueError: if it is anything else; the message says what was expected.
    """
    if value is None:
        return None
    if value == ALL_LAYERS:
        return Offload()
    if isinstance(value, Mapping) and value.keys() <= {"layers", "activations"}:
        layers, activations = value.get("layers", "all"), value.get("activations", False)
        is_count = isinstance(layers, int) and not isinstance(layers, bool) and layers >= 1
        if isinstance(activations, bool) and (is_count or layers in ("all", "auto")):
            return Offload(layers, activations)
    raise ValueError(f"expected {EXPECTED}")
