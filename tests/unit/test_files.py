"""Writes that happen completely or not at all: a reader never sees half a file, whatever ends the write."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sbft.files import replacing, sync, write_text


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "file.json"
    path.write_text("before")
    with replacing(path, shared=shared) as part:
        part.write_text("after")
        assert part.parent == tmp_path and path.read_text() == "before"
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shared", [False, True])
def test_an_error_leaves_the_file_as_it_was(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "file.json"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), replacing(path, shared=shared) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "before"
    assert part.exists() is not shared  # a partial file with a unique name would never be replaced
    write_text(path, "after")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_processes_that_share_a_file_write_to_paths_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with replacing(path, shared=True) as first, replacing(path, shared=True) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]  # it ended last


def test_a_synced_text_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_text(tmp_path / "synced", "text", synced=True)
    write_text(tmp_path / "not", "text")
    assert calls == ["fsync", "replace", "replace"]


@pytest.mark.parametrize(("number", "fails"), [("EINVAL", False), ("ENOTSUP", False), ("EIO", True)])
def test_a_folder_that_cannot_be_synced_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str, fails: bool
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(getattr(errno, number), "refused")

    monkeypatch.setattr(os, "fsync", refuse)
    if fails:
        with pytest.raises(OSError, match="refused"):
            sync(tmp_path)
    else:
        sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="refused"):
        sync(tmp_path / "file")
