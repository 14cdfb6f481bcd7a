"""Checkpoints of a run: what lies in its folder, which of it is sound, and where to go on from.

A checkpoint is written in the folder `incomplete` and gets its name, `checkpoint-N`, as the last act, so that whatever
bears such a name was written to its end. Sizes and checksums of its files, in its `complete.json`, tell whether it still
is as it was written. `latest` is a link to the newest.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sbft.files import replacing, sync

PREFIX = "checkpoint-"
MARK = "complete.json"
INCOMPLETE = "incomplete"
LATEST = "latest"
# The fastest of the standard library: on one core of a Xeon 2.4 GB/s, reading included, against 1.7 of Adler-32, 0.8 of
# SHA-256, 0.5 of MD5 and 0.4 of BLAKE2b. It finds every flip within 32 bits, and is no guard against forgery.
_CHECKSUM = "crc32"
_CHUNK_BYTES = 2**20

logger = logging.getLogger(__name__)


def find_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in the folder of a run whose files all have their sizes; None if it has none."""
    return next((str(one) for one in newest_first(folder) if damage(one, sizes_only=True) is None), None)


def sound_checkpoint(
    folder: Path, check: Callable[[Path], str | None] | None = None
) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose files are, byte for byte, as they were written; reads all of it.

    Args:
        folder: of the run.
        check: what is wrong with a checkpoint; None: `damage`.

    Returns:
        The checkpoint, None if there is none; and each newer one that is not sound, with what is wrong with it.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in newest_first(folder):
        reason = (check or damage)(checkpoint)
        if reason is None:
            return checkpoint, damaged
        damaged[checkpoint] = reason
    return None, damaged


def damage(checkpoint: Path, *, sizes_only: bool = False, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the files of a checkpoint; None if it is sound.

    Args:
        checkpoint: its folder. One whose `complete.json` holds sizes alone, as it once did, is checked for these.
        sizes_only: read no file, which for gigabytes takes seconds.
        share: (i, n): one of n processes that share the files looks at every n-th, from the i-th.
    """
    if not (checkpoint / MARK).is_file():
        return "it was cut off while being written"
    try:
        noted = _read_mark(checkpoint / MARK)
        for name, (size, checksum) in sorted(noted.items())[share[0] :: share[1]]:
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if checksum is not None and not sizes_only and _checksum(path) != checksum:
                return f"{name} is not what was written, by its checksum"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    return None


def files_of(checkpoint: Path, rank: int | None = None) -> list[Path]:
    """The files of a checkpoint that is being written, its mark aside; of several ranks', those that one has written."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MARK]
    return files if rank is None else [path for path in files if _writer(path) == rank]


def _writer(file: Path) -> int:
    """The rank that writes a file, by its name; what bears no rank's is the first one's."""
    state, part = re.fullmatch(r"rng_state_(\d+)\.pth", file.name), re.match(r"shard-(\d+)-", file.name)
    if state is not None:
        return int(state[1])
    return 0 if part is None else int(part[1]) - 1


def note(checkpoint: Path, files: Iterable[Path]) -> dict[str, dict[str, int | str]]:
    """Sizes and checksums of files in a checkpoint's folder, by their names there, once they have reached the disk.

    Raises:
        OSError: if the disk refuses.
    """
    files = list(files)
    # The disk writes one file while the processor reads another.
    with ThreadPoolExecutor() as pool:
        synced = [pool.submit(sync, path) for path in files]
        noted: dict[str, dict[str, int | str]] = {
            path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, _CHECKSUM: _checksum(path)}
            for path in files
        }
        for one in synced:
            one.result()
    return noted


def seal(checkpoint: Path, noted: dict[str, dict[str, int | str]] | None = None) -> None:
    """Write down sizes and checksums of a checkpoint's files, and wait until all of it has reached the disk.

    Args:
        checkpoint: its folder.
        noted: what `note` found of all files; None: it is asked now.

    Raises:
        OSError: if the disk refuses, or a file that was noted is not there.
    """
    if noted is None:
        noted = note(checkpoint, files_of(checkpoint))
    for name in noted:
        (checkpoint / name).stat()
    (checkpoint / MARK).write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")
    for path in [checkpoint / MARK, *{(checkpoint / name).parent for name in noted}, checkpoint]:
        sync(path)


def publish(written: Path, folder: Path) -> Path:
    """Give a sealed checkpoint in `incomplete` its place in the folder of the run, and let `latest` point at it.

    Raises:
        OSError: if the disk refuses.
    """
    final = folder / written.name
    if final.exists():
        _remove(final)
    os.rename(written, final)
    sync(folder)
    point_latest(folder, final)
    return final


def point_latest(folder: Path, checkpoint: Path) -> None:
    """Let `latest` point at a checkpoint that is complete; at no moment does it point at another."""
    try:
        with replacing(folder / LATEST) as part:
            part.unlink(missing_ok=True)
            part.symlink_to(checkpoint.name)
        sync(folder)
    except OSError as error:
        # Not every file system has links; nothing here reads this one.
        logger.warning(f"{folder / LATEST} cannot be made a link to {checkpoint.name}: {error}.")


def rotate(folder: Path, newest: Path, *, limit: int | None, best: Path | None) -> None:
    """Remove the oldest checkpoints but `limit`, as `save_total_limit` means it: never the newest, never the best."""
    if limit is None or limit <= 0:
        return
    kept = {newest.name} if best is None else {newest.name, best.name}
    others = [checkpoint for checkpoint in newest_first(folder) if checkpoint.name not in kept]
    for checkpoint in others[max(limit - len(kept), 0) :]:
        _remove(checkpoint)


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted write, or an interrupted removal, has left."""
    shutil.rmtree(folder / INCOMPLETE, ignore_errors=True)
    (folder / f"{LATEST}.part").unlink(missing_ok=True)


def go_back_to(checkpoint: Path, damaged: dict[Path, str]) -> None:
    """Remove the damaged checkpoints after one that a run goes on from: it will come to their steps again."""
    point_latest(checkpoint.parent, checkpoint)
    for one in damaged:
        _remove(one)
    remove_leftovers(checkpoint.parent)


def describe_damage(damaged: dict[Path, str], instead: Path) -> str:
    """A sentence on what is wrong with the newer checkpoints, and which one is used."""
    reasons = ", ".join(f"{one.name}: {reason}" for one, reason in damaged.items())
    return f"Damaged checkpoints are skipped: {reasons}. Resuming from {instead} instead"


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a run, for which none is of use any more."""
    (folder / LATEST).unlink(missing_ok=True)
    for checkpoint in folder.glob(f"{PREFIX}*"):
        shutil.rmtree(checkpoint)
    remove_leftovers(folder)


def size_bytes(checkpoint: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def _read_mark(mark: Path) -> dict[str, tuple[int, str | None]]:
    """Size and checksum of each file; the checksum None where the mark holds sizes alone."""
    noted: Any = json.loads(mark.read_text(encoding="utf-8"))
    try:
        files: dict[str, tuple[int, str | None]] = {
            name: (int(of_file), None) if isinstance(of_file, int) else (int(of_file["bytes"]), str(of_file[_CHECKSUM]))
            for name, of_file in noted.items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{mark.name} is not as sbft writes it") from error
    if not files:
        raise ValueError(f"{mark.name} names no file")
    return files


def newest_first(folder: Path) -> list[Path]:
    """Folders named `checkpoint-N`, by N."""
    steps = {
        path: path.name.removeprefix(PREFIX)
        for path in (folder.glob(f"{PREFIX}*") if folder.is_dir() else ())
        if path.is_dir() and not path.is_symlink()
    }
    found = [path for path, step in steps.items() if step.isdecimal()]
    return sorted(found, key=lambda path: int(steps[path]), reverse=True)


def _remove(checkpoint: Path) -> None:
    """Take its name away first, so that half a checkpoint never bears one."""
    aside = checkpoint.parent / INCOMPLETE / f"{checkpoint.name}.old"
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(checkpoint, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _checksum(path: Path) -> str:
    """The CRC-32 of a file, as hexadecimal digits."""
    value = 0
    with path.open("rb", buffering=0) as file:
        chunk = memoryview(bytearray(_CHUNK_BYTES))
        while count := file.readinto(chunk):
            value = zlib.crc32(chunk[:count], value)
    return f"{value:08x}"
