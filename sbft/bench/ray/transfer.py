"""Sends files between machines that share no file system: small ones whole, large ones in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbft.bench.process import log_beside
from sbft.bench.suite_runs import LOG_FILE
from sbft.files import replacing
from sbft.runs.record import FILE_NAME

INLINE_BYTES = 1 << 20
"""A larger file goes into the cluster's object store, and only references to its pieces are sent."""
PIECE_BYTES = 64 << 20

Put = Callable[[bytes], Any]
"""Puts a piece into the object store; returns a reference for `Get`."""
Get = Callable[[Any], bytes]


@dataclass(frozen=True)
class Parcel:
    """A packed file: its name relative to the folder it comes from, and its content."""

    name: str
    pieces: tuple[Any, ...]
    """Bytes, or references to them."""


def pack(folder: Path, names: Iterable[str], put: Put) -> list[Parcel]:
    """Pack files of a folder.

    Args:
        folder: the folder that they are in.
        names: of the files, relative to the folder.
        put: puts each piece of a large file into the object store.
    """
    return [Parcel(name, tuple(_pieces(folder / name, put))) for name in names]


def files_below(folder: Path) -> list[str]:
    """Names of all files below a folder, including subfolders; empty if there is no such folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def unpack(parcels: Iterable[Parcel], folder: Path, get: Get) -> None:
    """Write packed files into a folder, which is made if needed. Readers never see a partly written file."""
    for parcel in parcels:
        _write(parcel, folder / parcel.name, get)


def unpack_run(parcels: Iterable[Parcel], folder: Path, get: Get) -> None:
    """Write the files of an ended run in the places where a local process leaves them: the log beside the folder.

    The record comes last: if this is interrupted, the run counts as not made.
    """
    for parcel in sorted(parcels, key=lambda parcel: parcel.name == FILE_NAME):
        _write(parcel, log_beside(folder) if parcel.name == LOG_FILE else folder / parcel.name, get)


def _pieces(path: Path, put: Put) -> Iterable[Any]:
    if path.stat().st_size <= INLINE_BYTES:
        yield path.read_bytes()
        return
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield put(piece)


def _write(parcel: Parcel, path: Path, get: Get) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, part.open("wb") as file:
        for piece in parcel.pieces:
            file.write(piece if isinstance(piece, bytes) else get(piece))
