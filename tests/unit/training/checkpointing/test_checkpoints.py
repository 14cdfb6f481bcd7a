"""Which checkpoint a run resumes from: the newest intact one, wherever a write or a removal was cut off."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_utils import rotate_checkpoints

from sbft.training.checkpointing import checkpoints
from sbft.training.checkpointing.checkpoints import (
    damage,
    find_checkpoint,
    go_back_to,
    publish,
    remove_checkpoints,
    rotate,
    seal,
    sound_checkpoint,
)

FILES = {"model.safetensors": bytes(range(256)) * 400, "optimizer.pt": b"state", "global_step2/shard.pt": b"part"}


def write(folder: Path, step: int) -> Path:
    """Write the files of a checkpoint under its temporary name."""
    written = folder / "incomplete" / f"checkpoint-{step}"
    for name, content in FILES.items():
        (written / name).parent.mkdir(parents=True, exist_ok=True)
        (written / name).write_bytes(content + bytes([step]))
    return written


def complete(folder: Path, *steps: int) -> list[Path]:
    made = []
    for step in steps:
        seal(written := write(folder, step))
        made.append(publish(written, folder))
    return made


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "none") is None and find_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-best").mkdir()
    write(tmp_path, 3)
    assert find_checkpoint(tmp_path) is None and sound_checkpoint(tmp_path) == (None, {})


def test_the_newest_is_taken_by_number_and_those_without_a_mark_are_named(tmp_path: Path) -> None:
    _, newest = complete(tmp_path, 2, 10)
    assert sound_checkpoint(tmp_path) == (newest, {}) and os.readlink(tmp_path / "latest") == "checkpoint-10"
    (tmp_path / "checkpoint-12").mkdir()
    found, damaged = sound_checkpoint(tmp_path)
    assert found == newest and damaged == {tmp_path / "checkpoint-12": "it was not written completely"}
    assert find_checkpoint(tmp_path) == str(newest)


@pytest.mark.parametrize("name", [*FILES, "complete.json"])
def test_a_flipped_byte_in_any_file_is_found(tmp_path: Path, name: str) -> None:
    older, newer = complete(tmp_path, 2, 4)
    file = newer / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found, damaged = sound_checkpoint(tmp_path)
    assert found == older and (name in damaged[newer])


def test_a_truncated_or_missing_file_is_found_without_reading(tmp_path: Path) -> None:
    older, newer = complete(tmp_path, 2, 4)
    os.truncate(newer / "model.safetensors", 100)
    assert damage(newer, sizes_only=True) == f"model.safetensors has 100 bytes, not {256 * 400 + 1}"
    assert find_checkpoint(tmp_path) == str(older)
    (older / "optimizer.pt").unlink()
    assert damage(older, sizes_only=True) == "optimizer.pt is missing" and find_checkpoint(tmp_path) is None


def test_a_checkpoint_whose_mark_holds_sizes_alone_is_still_found(tmp_path: Path) -> None:
    (checkpoint,) = complete(tmp_path, 2)
    noted = json.loads((checkpoint / "complete.json").read_text())
    (checkpoint / "complete.json").write_text(json.dumps({name: of_file["bytes"] for name, of_file in noted.items()}))
    assert sound_checkpoint(tmp_path) == (checkpoint, {})
    os.truncate(checkpoint / "optimizer.pt", 1)
    assert sound_checkpoint(tmp_path)[0] is None


@pytest.mark.parametrize("best", [None, 2, 6])
@pytest.mark.parametrize("limit", [None, 1, 2, 3, 9])
def test_rotation_keeps_what_the_trainers_own_keeps(tmp_path: Path, limit: int | None, best: int | None) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (mine, theirs):
        for step in (2, 4, 6, 10):
            (folder / f"checkpoint-{step}").mkdir(parents=True)
    rotate(
        mine,
        mine / "checkpoint-10",
        limit=limit,
        best=None if best is None else Path("elsewhere") / f"checkpoint-{best}",
    )
    rotate_checkpoints(str(theirs), limit, None if best is None else str(theirs / f"checkpoint-{best}"))
    kept = [sorted(path.name for path in folder.glob("checkpoint-*")) for folder in (mine, theirs)]
    assert kept[0] == kept[1]


class Killed(BaseException):
    """Nothing runs after it, as after kill -9: none of the functions here cleans up."""


def kill_at(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """Lets `last` changes of the disk pass, and raises `Killed` at the next."""
    passed = [0]

    def counting(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            if passed[0] == last:
                raise Killed
            passed[0] += 1
            return change(*args, **kwargs)

        return changed

    for owner, name in (
        (os, "rename"),
        (os, "replace"),
        (os, "fsync"),
        (os, "symlink"),
        (checkpoints.shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
    monkeypatch.setattr(Path, "symlink_to", counting(Path.symlink_to))
    monkeypatch.setattr(Path, "write_text", counting(Path.write_text))


def test_killed_between_any_two_changes_of_the_disk_a_sound_one_is_left_and_latest_is_complete(tmp_path: Path) -> None:
    for last in range(100):
        folder = tmp_path / str(last)
        complete(folder, 2)
        with pytest.MonkeyPatch.context() as patched:
            kill_at(patched, last)
            try:
                seal(written := write(folder, 4))
                rotate(folder, publish(written, folder), limit=1, best=None)
                survived = False
            except Killed:
                survived = True
        found, damaged = sound_checkpoint(folder)
        assert found is not None and not damaged
        assert damage((folder / "latest").resolve()) is None
        # The next start removes what was left over, and the same step can be written.
        go_back_to(found, damaged)
        assert {path.name for path in folder.iterdir()} - {"checkpoint-2", "checkpoint-4", "latest"} == set()
        if not survived:
            break
        complete(folder, 4)
        assert sound_checkpoint(folder)[0] == folder / "checkpoint-4"
    assert last > 10 and not (folder / "checkpoint-2").exists()


def test_a_run_that_goes_back_removes_the_damaged_ones_and_latest_follows(tmp_path: Path) -> None:
    older, newer = complete(tmp_path, 2, 4)
    os.truncate(newer / "optimizer.pt", 1)
    found, damaged = sound_checkpoint(tmp_path)
    assert found == older
    go_back_to(older, damaged)
    assert not newer.exists() and (tmp_path / "latest").resolve() == older
    remove_checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())
