"""Which library errors mean that writing to the disk failed."""

from __future__ import annotations

from safetensors import SafetensorError

from sbft.training.checkpointing.disk_errors import refusal


def test_what_safetensors_says_is_understood() -> None:
    said = "Error while serializing: I/O error: File too large (os error 27)"
    assert refusal(SafetensorError(said)) == "the file would be larger than this process may write (ulimit -f)"


def test_what_is_no_fault_of_the_disk_is_left_alone() -> None:
    assert refusal(SafetensorError("Error while deserializing header: code 27")) is None
    assert refusal(ValueError("os error 27)")) is None
