"""Pages of mapped files are released, and have the file's content when they are read again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sbft.native.mapped import MappedFiles

SIZE = 32 << 20


def resident_of_files() -> int:
    found = re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="Linux alone says what is mapped")
def test_pages_of_a_file_are_given_back_and_read_again(tmp_path: Path) -> None:
    values = torch.arange(SIZE // 4, dtype=torch.int32)
    save_file({"weight": values, "next": torch.ones(8)}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        weight = file.get_tensor("weight")
    assert torch.equal(weight, values)
    read = resident_of_files()
    MappedFiles().forget(weight.data_ptr(), weight.nbytes)
    assert read - resident_of_files() > 0.9 * SIZE
    assert torch.equal(weight, values)


def test_other_memory_is_left_alone() -> None:
    values = torch.arange(SIZE // 4, dtype=torch.int32)
    files = MappedFiles()
    files.forget(values.data_ptr(), values.nbytes)
    files.forget(0, 0)
    assert values[-1] == SIZE // 4 - 1 and values[1] == 1
