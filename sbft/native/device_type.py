"""Lets meta tensors stand for tensors of a device: code that asks for their type of device gets that device's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_stood_for: ContextVar[str] = ContextVar("stood_for", default="meta")


def device_type(tensor: Tensor) -> str:
    """The type of device that a tensor is on, or stands for."""
    kind = tensor.device.type
    return _stood_for.get() if kind == "meta" else kind


@contextmanager
def standing_for(kind: str) -> Iterator[None]:
    """Within, meta tensors stand for tensors of this type of device."""
    token = _stood_for.set(kind)
    try:
        yield
    finally:
        _stood_for.reset(token)
