"""Texts for token files: the standard library's sources, a local file, or a data set streamed from the hub."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbft.data.files import read_file
from sbft.errors import DataError
from sbft.models.hub import hub_reachable, hub_state

if TYPE_CHECKING:
    from datasets import Dataset

PYTHON_SOURCES = "builtin:python-stdlib"
VALIDATION_SHARE = 0.05
_ONE_IN = round(1 / VALIDATION_SHARE)
MOST_VALIDATION_TOKENS = 2**21
"""Limit for a stream, whose length is not known beforehand. 200 windows of 2048 tokens are a fifth of it."""
SUBSETS = {"HuggingFaceFW/fineweb-edu": "sample-10BT", "allenai/c4": "en"}
"""Subsets of hub data sets to use if a recipe names none."""
_NOT_OF_PYTHON = {"site-packages", "dist-packages"}


class LocalCorpus:
    """Documents that are all available locally; the last of them are for validation.

    Args:
        source: their name in a recipe.
        training, validation: number of documents for each.
        read: returns the document with a number; those for validation have the highest numbers.
        content: a digest of the documents and of their order, which identifies them.
    """

    def __init__(self, source: str, training: int, validation: int, read: Callable[[int], str], content: str) -> None:
        self.source, self.content = source, content
        self._training, self._validation, self._read = training, validation, read

    def documents(self, done: int, state: Any = None) -> Iterator[str]:
        """See `sbft.data.token_files.Corpus`."""
        return (self._read(number) for number in range(done, self._training + self._validation))

    def training_texts(self) -> Iterator[str]:
        """The documents that a tokenizer may learn from."""
        return self.texts(held_out=False)

    def texts(self, *, held_out: bool) -> Iterator[str]:
        """The documents for validation, or those for training."""
        return self.documents(self._training) if held_out else islice(self.documents(0), self._training)

    def state(self) -> None:
        """See `sbft.data.token_files.Corpus`: the number of documents is enough."""

    def is_held_out(self, number: int, held_out_tokens: int) -> bool:
        """See `sbft.data.token_files.Corpus`."""
        return number >= self._training


class HubCorpus:
    """A text column of a streamed data set; one document in 20 is for validation.

    Args:
        source: its name in a recipe.
        stream: an iterable data set of `datasets`, whose `state_dict` holds its position.
        column: the column that holds the text.
    """

    def __init__(self, source: str, stream: Any, column: str) -> None:
        self.source, self._stream, self._column = source, stream, column

    def documents(self, done: int, state: Any) -> Iterator[str]:
        """See `sbft.data.token_files.Corpus`; errors of the hub become DataErrors."""
        if state is not None:
            self._stream.load_state_dict(state)
        try:
            for row in self._stream:
                if not isinstance(row.get(self._column), str):
                    raise DataError(
                        f"The data {self.source} has no text in column {self._column!r}; its columns are "
                        f"{', '.join(map(repr, row))}. Set data.text."
                    )
                yield row[self._column]
        except DataError:
            raise
        except Exception as error:  # raised by datasets, by its readers, or by the hub's client and its libraries
            raise _not_streamed(self.source, error) from error

    def state(self) -> Any:
        """See `sbft.data.token_files.Corpus`."""
        return self._stream.state_dict()

    def is_held_out(self, number: int, held_out_tokens: int) -> bool:
        """See `sbft.data.token_files.Corpus`."""
        return number % _ONE_IN == _ONE_IN - 1 and held_out_tokens < MOST_VALIDATION_TOKENS


def python_sources(folder: Path | None = None) -> LocalCorpus:
    """The running interpreter's standard library: every module's source, about 30 MB of text.

    The files are ordered by a hash of their path, so the last of them are like the others. Files that are not UTF-8 (a
    few of Python's own tests) are left out.

    Args:
        folder: the library's folder; None for that of this Python.

    Raises:
        DataError: if there are no sources, as in a Python installed without them.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if _NOT_OF_PYTHON.isdisjoint(path.relative_to(root).parts)]
    names = sorted((path.relative_to(root).as_posix() for path in paths), key=_digest)
    content = hashlib.sha256(platform.python_version().encode())
    kept = []
    for name in names:
        whole = (root / name).read_bytes()
        if whole.strip() and _is_utf8(whole):
            kept.append(name)
            content.update(f"{name}\0{len(whole)}\0".encode() + whole)
    if len(kept) < 2:
        raise DataError(
            f"{PYTHON_SOURCES} finds no sources in {root}. Give a text file of your own: data.train: my.txt, with tokenizer: "
            "bpe:2048."
        )
    validation = _share(len(kept))
    return LocalCorpus(
        PYTHON_SOURCES,
        len(kept) - validation,
        validation,
        lambda number: (root / kept[number]).read_bytes().decode(),
        content.hexdigest(),
    )


def text_rows(source: str, column: str, validation: str | None = None) -> LocalCorpus:
    """The texts of a local file in their original order; each row is a document.

    Without a validation file, the rows with the highest hashes are held out, so equal rows stay together.

    Args:
        source: .txt, .jsonl, .json, .csv or .parquet file.
        column: the column that holds the text.
        validation: file with the texts for validation.

    Raises:
        DataError: if a file cannot be read, has no such column, or is too short to be split.
    """
    rows = _texts(source, column)
    validation_texts = [] if validation is None else list(_nonempty(_texts(validation, column)))
    kept = list(_nonempty(rows))
    content = hashlib.sha256("".join(digest for _, digest in kept + validation_texts).encode())
    if validation is None:
        if len(kept) < 2:
            raise DataError(
                f"{source} holds {len(kept)} documents, of which none can be held out for validation. Give data.validation "
                "a file of its own; in a .txt file, documents are separated by blank lines."
            )
        held_out = {number for number, _ in sorted(kept, key=lambda numbered: numbered[1])[-_share(len(kept)) :]}
        order = [number for number, _ in kept if number not in held_out]
        read = _reader(rows, [*order, *sorted(held_out)])
        return LocalCorpus(source, len(order), len(held_out), read, content.hexdigest())
    first = _reader(rows, [number for number, _ in kept])
    second = _reader(_texts(validation, column), [number for number, _ in validation_texts])

    def read_both(number: int) -> str:
        return first(number) if number < len(kept) else second(number - len(kept))

    return LocalCorpus(source, len(kept), len(validation_texts), read_both, content.hexdigest())


def _nonempty(texts: Any) -> Iterator[tuple[int, str]]:
    """Yields the number and the digest of each text that is not blank."""
    for number, text in enumerate(texts):
        if isinstance(text, str) and text.strip():
            yield number, _digest(text)


def _reader(texts: Any, order: list[int]) -> Callable[[int], str]:
    return lambda number: str(texts[order[number]])


def hub_texts(source: str, subset: str | None, split: str, column: str) -> HubCorpus:
    """The texts of a data set on the hub, streamed: only what is read is downloaded.

    Raises:
        DataError: if the hub cannot be reached, or has no such data.
    """
    from datasets import load_dataset

    try:
        return HubCorpus(source, load_dataset(source, subset, split=split, streaming=True), column)
    except Exception as error:  # raised by datasets, or by the hub's client and its libraries
        raise _not_streamed(source, error) from error


def _texts(source: str, column: str) -> Any:
    rows: Dataset = read_file(Path(source).expanduser())
    if column not in rows.column_names:
        raise DataError(
            f"{source} has no column {column!r} with text to pretrain on; its columns are "
            f"{', '.join(map(repr, rows.column_names))}. Set data.text to the name of the right one; questions and answers "
            "are for a trained model: give its id or folder in place of scratch:NAME."
        )
    return rows[column]


def _not_streamed(source: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:300]
    if not hub_reachable():
        return DataError(
            f"The data {source} is neither a file, nor a folder of prepared tokens, nor builtin:python-stdlib, and it cannot "
            f"be streamed from the hub: {hub_state()}. What has been prepared so far is kept."
        )
    return DataError(
        f"The data {source} could not be streamed from the hub: {reason} Check its id, data.subset and data.train_split. "
        "What has been prepared so far is kept: type the same command again."
    )


def _share(count: int) -> int:
    return max(round(VALIDATION_SHARE * count), 1)


def _digest(text: Any) -> str:
    return hashlib.sha256(str(text).encode("utf-8", errors="surrogatepass")).hexdigest()


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
