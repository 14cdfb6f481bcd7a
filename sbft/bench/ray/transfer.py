"""Files on their way between machines that share no file system: small ones as they are, large ones in pieces."""

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
"""A larger file is handed to the cluster's object store, of which the answer then holds references."""
PIECE_BYTES = 64 << 20

Put = Callable[[bytes], Any]
"""Takes a piece into the object store; returns what `Get` gives it back for."""
Get = Callable[[Any], bytes]


@dataclass(frozen=True)
class Parcel:
    """A file: its name below the folder that it was packed from, and its content."""

    name: str
    pieces: tuple[Any, ...]
    """Bytes, or references."""


def pack(folder: Path, names: Iterable[str], put: Put) -> list[Parcel]:
    """Pack files of a folder.

    Args:
        folder: where they lie.
        names: of the files, below the folder.
        put: takes each piece of a file that is too large to go with the answer.
    """
    return [Parcel(name, tuple(_pieces(folder / name, put))) for name in names]


def files_below(folder: Path) -> list[str]:
    """Names of all files below a folder, those in its folders among them; none if there is no folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def unpack(parcels: Iterable[Parcel], folder: Path, get: Get) -> None:
    """Write packed files into a folder, which is made; a reader never sees half of one."""
    for parcel in parcels:
        _write(parcel, folder / parcel.name, get)


def unpack_run(parcels: Iterable[Parcel], folder: Path, get: Get) -> None:
    """Write the files of a run whose process has ended as that process leaves them: its log beside its folder.

    The record comes last: where this is cut off, the run counts as one that was not made.
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
