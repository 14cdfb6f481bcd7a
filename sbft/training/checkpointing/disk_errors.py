"""Errors of a disk that is full, read-only or broken, in a sentence."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sbft.errors import DiskError
from sbft.native.sizes import GIB, gib, mib

_REASONS = {
    errno.ENOSPC: "no space is left there",
    errno.EDQUOT: "your quota there is used up",
    errno.EFBIG: "the file would be larger than this process may write (ulimit -f)",
    errno.EROFS: "it is mounted read-only",
    errno.EACCES: "there is no permission to",
    errno.EPERM: "there is no permission to",
    errno.EIO: "the device answers with an input/output error",
}
# Errors that only writing raises.
FULL_OR_READ_ONLY = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# safetensors raises errors of its own with the number in the text; torch.save only says that its writer failed.
_IN_WORDS = {f"os error {number})": reason for number, reason in _REASONS.items()}
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")


def refusal(error: BaseException) -> str | None:
    """Why the disk refused to write, if this error says so; else None."""
    if isinstance(error, OSError):
        return _REASONS.get(error.errno or 0)
    text = str(error)
    if isinstance(error, SafetensorError):
        return next((reason for words, reason in _IN_WORDS.items() if words in text), None)
    if isinstance(error, RuntimeError) and any(words in text for words in _TORCH_WRITER):
        # Its clean-up after the failed write fails too, and replaces the first error.
        before = error.__context__
        return (None if before is None else refusal(before)) or "writing failed, as it does where no space is left"
    return None


@contextmanager
def writing(what: str, folder: Path, *, takes_bytes: int | None = None) -> Iterator[None]:
    """Around writes: turn errors of the disk into a sentence.

    Args:
        what: is written; the beginning of the sentence.
        folder: to which it is written; it exists, or its parent does.
        takes_bytes: the space that it needs, if known.

    Raises:
        DiskError: instead of the errors that safetensors, torch or the system raise.
    """
    try:
        yield
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            raise
        raise DiskError(f"{what} could not be written to {folder}: {reason}.{_room(folder, takes_bytes)}") from error


def _room(folder: Path, takes_bytes: int | None) -> str:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = f" {_size(shutil.disk_usage(there).free)} are free there"
    needed = "" if takes_bytes is None else f", and {_size(takes_bytes)} are needed"
    return f"{free}{needed}."


def _size(size_bytes: int) -> str:
    return gib(size_bytes, 1) if size_bytes >= GIB else mib(size_bytes, 1)
