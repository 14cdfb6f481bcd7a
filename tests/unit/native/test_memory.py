"""The measured peak covers what was allocated, touched and freed inside the block, and nothing from before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sbft.native.memory
from sbft.native.memory import PeakMemory, device_name, model_bytes, optimizer_state_bytes, type_of
from tests.tiny import tiny_model

MIB = 2**20
linux_cpu = pytest.mark.skipif(
    torch.cuda.is_available() or not Path("/proc/self/clear_refs").exists(), reason="resident memory of Linux"
)


def _allocate_and_free(mib: int) -> None:
    torch.ones(mib * MIB, dtype=torch.uint8)


@linux_cpu
def test_a_peak_inside_is_seen_after_it_is_gone_and_one_before_is_not() -> None:
    _allocate_and_free(400)
    with PeakMemory() as peak:
        _allocate_and_free(150)
    inside = peak.peak_bytes - peak.baseline_bytes
    assert 145 * MIB <= inside <= 200 * MIB
    assert peak.kind == "resident" and peak.note is None and peak.reserved_peak_bytes is None
    before = peak.peak_bytes
    _allocate_and_free(300)
    assert peak.peak_bytes == before


@linux_cpu
def test_the_peak_so_far_can_be_read_and_a_second_use_starts_anew() -> None:
    peak = PeakMemory()
    with peak:
        held = torch.ones(100 * MIB, dtype=torch.uint8)
        assert peak.peak_bytes - peak.baseline_bytes >= 95 * MIB
    del held
    with peak:
        pass
    assert peak.peak_bytes - peak.baseline_bytes < 50 * MIB


def test_where_the_peak_cannot_be_set_back_a_note_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sbft.native.memory, "_CLEAR", tmp_path / "missing" / "clear_refs")
    monkeypatch.setattr(sbft.native.memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with PeakMemory() as peak:
        pass
    assert peak.note is not None and "whole process" in peak.note
    assert peak.peak_bytes >= 50 * MIB  # torch alone takes that; also catches KiB mistaken for bytes


def test_tied_weights_count_once() -> None:
    tied, untied = tiny_model(tied=True), tiny_model(tied=False)
    table = 512 * 64 * 2
    assert model_bytes(untied) - model_bytes(tied) == table
    buffers = sum(b.numel() * b.element_size() for b in untied.buffers())
    assert model_bytes(untied) == sum(p.numel() * 2 for p in untied.parameters()) + buffers


def test_optimizer_state_counts_its_tensors() -> None:
    weight = torch.nn.Parameter(torch.zeros(10, 10))
    optimizer = torch.optim.Adam([weight])
    assert optimizer_state_bytes(optimizer) == 0
    weight.grad = torch.ones(10, 10)
    optimizer.step()
    assert optimizer_state_bytes(optimizer) == 2 * 400 + 4  # both moments, and torch's step counter


def test_device_name_says_something() -> None:
    assert len(device_name()) > 5


def test_what_runs_on_the_cpu_is_measured_there_though_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    assert PeakMemory().kind == "cuda_allocated"
    with PeakMemory("cpu") as peak:
        assert peak.kind == "resident" and peak.peak_bytes > 0
    assert "core" in device_name(torch.device("cpu"))


def test_a_torch_built_for_cuda_measures_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_such_a_build(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", of_such_a_build)
    assert type_of() == "cpu" and PeakMemory().kind == "resident"
