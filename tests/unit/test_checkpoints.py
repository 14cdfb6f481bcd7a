"""Which checkpoint a run goes on from: the newest whose files are all there in full."""

from __future__ import annotations

from pathlib import Path

from sbft.training.checkpoints import cut_off_checkpoints, find_checkpoint, is_complete, mark_complete


def write_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(bytes(100))
    (checkpoint / "trainer_state.json").write_text("{}")
    return checkpoint


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "none") is None and find_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-best").mkdir()
    assert find_checkpoint(tmp_path) is None and cut_off_checkpoints(tmp_path) == []


def test_the_newest_complete_one_is_taken_by_number_and_the_cut_off_ones_are_named(tmp_path: Path) -> None:
    for step in (2, 10):
        mark_complete(write_checkpoint(tmp_path, step))
    assert find_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10") and cut_off_checkpoints(tmp_path) == []
    never_marked = write_checkpoint(tmp_path, 12)
    assert find_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert cut_off_checkpoints(tmp_path) == [never_marked]


def test_a_truncated_or_missing_file_makes_it_incomplete(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 2)
    mark_complete(checkpoint)
    assert is_complete(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(bytes(99))
    assert not is_complete(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(bytes(100))
    (checkpoint / "trainer_state.json").unlink()
    assert not is_complete(checkpoint)
