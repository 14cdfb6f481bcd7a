"""Meta tensors as stand-ins for those of a device: code that asks for the device of a tensor is told the one meant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_meant: ContextVar[str] = ContextVar("meant", default="meta")


def device_type(tensor: Tensor) -> str:
    """The type of device that a tensor is on, or stands for."""
    kind = tensor.device.type
    return _meant.get() if kind == "meta" else kind


@contextmanager
def standing_for(kind: str) -> Iterator[None]:
    """Within, meta tensors stand for tensors of this type of device."""
    token = _meant.set(kind)
    try:
        yield
    finally:
        _meant.reset(token)
