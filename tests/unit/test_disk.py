"""Which errors of libraries mean that the disk refused."""

from __future__ import annotations

import pytest
from safetensors import SafetensorError

from sbft.training.disk import refusal


@pytest.mark.parametrize(
    "said",
    [
        "Error while serializing: I/O error: File too large (os error 27)",
        'Error while serializing: IoError(Os { code: 27, kind: FileTooLarge, message: "File too large" })',  # before 0.5
    ],
)
def test_every_version_of_safetensors_is_understood(said: str) -> None:
    assert refusal(SafetensorError(said)) == "the file would be larger than this process may write (ulimit -f)"


def test_what_is_no_fault_of_the_disk_is_left_alone() -> None:
    assert refusal(SafetensorError("Error while deserializing header: code 27")) is None
    assert refusal(ValueError("os error 27)")) is None
