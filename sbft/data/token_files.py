"""Token files: the token ids of a corpus, ready to be read window by window, with the tokenizer that made them.

A folder holds:

- `train.bin` and `validation.bin`: plain arrays of `uint16`, or of `uint32` if the vocabulary requires it. They are the
  documents one after the other, each followed by the end token.
- `tokenizer/`: the tokenizer.
- `tokens.json`: written last, so a folder without it is unfinished.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from sbft.errors import DataError
from sbft.files import replacing, write_text

MANIFEST = "tokens.json"
TOKENIZER_FOLDER = "tokenizer"
TRAIN, VALIDATION = "train", "validation"
PARTS = (TRAIN, VALIDATION)
_SCHEMA = 1
_PROGRESS = "progress.json"
_DOCUMENTS_AT_ONCE = 256

Encode = Callable[[list[str]], Sequence[Sequence[int]]]


class Corpus(Protocol):
    """Documents in an order that is the same every time."""

    @property
    def source(self) -> str:
        """Its name in a recipe."""

    def documents(self, done: int, state: Any) -> Iterator[str]:
        """Yields the documents after the first `done`; `state` is what `state()` returned after the last of those."""

    def state(self) -> Any:
        """What it takes, as JSON, to resume after the last document; None if the number of documents is enough."""

    def is_held_out(self, number: int, held_out_tokens: int) -> bool:
        """Whether document `number`, from 0, is for validation, for which there are `held_out_tokens` already."""


@dataclass(frozen=True)
class TokenFiles:
    """A finished folder of tokens."""

    folder: Path
    source: str
    tokenizer: str
    """The name of the tokenizer when the folder was made; the tokenizer itself is in `tokenizer_folder`."""
    vocabulary: int
    dtype: str
    tokens: dict[str, int]
    """Number of tokens of each part, with the end tokens."""
    documents: dict[str, int]
    """Number of documents of each part."""

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer, in Hugging Face's format."""
        return self.folder / TOKENIZER_FOLDER

    def path(self, part: str) -> Path:
        """The file of a part."""
        return self.folder / f"{part}.bin"


def is_token_folder(source: str | Path) -> bool:
    """Whether this is a finished folder of tokens."""
    return (Path(source).expanduser() / MANIFEST).is_file()


def read_token_files(folder: str | Path) -> TokenFiles:
    """Describes a finished folder without reading its tokens.

    Raises:
        DataError: if it is unfinished, is of another version, or its files do not have the expected size.
    """
    folder = Path(folder).expanduser()
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        schema = content.pop("schema")
        files = TokenFiles(folder, **content) if schema == _SCHEMA else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"The folder {folder} holds no tokens that can be read: {MANIFEST} is missing or damaged "
            f"({type(error).__name__}). Make it again with sbft prepare-data."
        ) from error
    if files is None:
        raise DataError(
            f"The tokens in {folder} have schema {schema}, expected {_SCHEMA}. Make them again with sbft prepare-data."
        )
    for part in PARTS:
        path, expected = files.path(part), files.tokens[part] * np.dtype(files.dtype).itemsize
        size = path.stat().st_size if path.is_file() else 0
        if size != expected:
            raise DataError(
                f"{path} has {size:,} bytes, and {MANIFEST} says {expected:,}. Remove {folder} and make it again with "
                "sbft prepare-data."
            )
    return files


def write_token_files(
    folder: Path,
    corpus: Corpus,
    encode: Encode,
    *,
    end_token: int,
    vocabulary: int,
    tokenizer: str,
    content: str = "",
    limit: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> TokenFiles:
    """Writes a corpus as token files, or resumes what a killed process has begun; the bytes are the same either way.

    Only one process at a time may write to a folder. The tokenizer must already be there.

    Args:
        folder: where to write; it must exist.
        corpus: the documents to write.
        encode: turns texts into token ids, without adding special tokens.
        end_token: appended to every document.
        vocabulary: number of tokens in the vocabulary, which decides the dtype.
        tokenizer: its name.
        content: a digest of the corpus, as a preparation of something else cannot be resumed.
        limit: stop after the document that brings the training tokens to this number; None to write all.
        say: called now and then with a line about the progress.

    Raises:
        DataError: if the folder holds an unfinished preparation of something else.
    """
    dtype = np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)
    about = {"source": corpus.source, "tokenizer": tokenizer, "vocabulary": vocabulary, "dtype": dtype.name}
    progress = _Progress.load(folder, {**about, "limit": limit, "content": content})
    files = {part: _open_at(folder / f"{part}.bin", progress.tokens[part] * dtype.itemsize) for part in PARTS}
    try:
        texts = corpus.documents(progress.done, progress.state)
        while not progress.reached(limit) and (batch := list(islice(texts, _DOCUMENTS_AT_ONCE))):
            for ids in encode(batch):
                part = VALIDATION if corpus.is_held_out(progress.done, progress.tokens[VALIDATION]) else TRAIN
                files[part].write(np.array([*ids, end_token], dtype=dtype).tobytes())
                progress.count(part, len(ids) + 1)
                if progress.reached(limit):
                    break
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            progress.state = corpus.state()
            progress.save(folder)
            say(f"{progress.tokens[TRAIN]:,} tokens" + ("" if limit is None else f" of {limit:,}"))
    finally:
        for file in files.values():
            file.close()
    manifest = {"schema": _SCHEMA, **about, "tokens": progress.tokens, "documents": progress.documents}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2), synced=True)
    (folder / _PROGRESS).unlink(missing_ok=True)
    return read_token_files(folder)


@dataclass
class _Progress:
    """How far a preparation has come; whatever the files hold beyond that does not count."""

    about: dict[str, Any]
    done: int
    """Number of documents written."""
    tokens: dict[str, int]
    documents: dict[str, int]
    state: Any

    @classmethod
    def load(cls, folder: Path, about: dict[str, Any]) -> _Progress:
        path = folder / _PROGRESS
        if not path.is_file():
            return cls(about, 0, dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0), None)
        saved = cls(**json.loads(path.read_text(encoding="utf-8")))
        if saved.about != about:
            differing = [
                f"{key} ({saved.about.get(key)}, here {about[key]})" for key in about if saved.about[key] != about[key]
            ]
            raise DataError(
                f"{folder} holds an unfinished preparation of other tokens: they differ in {', '.join(differing)}. Finish it "
                "with the recipe that began it, type another --to, or remove the folder."
            )
        return saved

    def count(self, part: str, tokens: int) -> None:
        self.done += 1
        self.tokens[part] += tokens
        self.documents[part] += 1

    def reached(self, limit: int | None) -> bool:
        return limit is not None and self.tokens[TRAIN] >= limit

    def save(self, folder: Path) -> None:
        write_text(folder / _PROGRESS, json.dumps(vars(self), indent=2), synced=True)


def _open_at(path: Path, size: int) -> BinaryIO:
    """Opens the file for writing after its first `size` bytes, which are known to be good; the rest is discarded."""
    path.touch()
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file


def save_tokenizer(folder: Path, save: Callable[[Path], object]) -> Path:
    """Writes the tokenizer by `save` unless it is there already, whole or not at all; returns its folder."""
    destination = folder / TOKENIZER_FOLDER
    if not destination.is_dir():
        with replacing(destination) as part:
            shutil.rmtree(part, ignore_errors=True)
            save(part)
    return destination
