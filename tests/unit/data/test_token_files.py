"""Token files: the same bytes whatever interrupts their writing, and windows that match their content."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import IterableDataset

from sbft.data import token_files
from sbft.data.bpe import END, train_bpe, vocabulary_of
from sbft.data.corpus import MOST_VALIDATION_TOKENS, HubCorpus, LocalCorpus, python_sources, text_rows
from sbft.data.token_files import TRAIN, VALIDATION, TokenFiles, read_token_files, save_tokenizer, write_token_files
from sbft.data.windows import TokenSplits, TokenWindows, collate_windows
from sbft.errors import DataError

END_TOKEN = 256
TEXTS = [f"Document {n} " + "spam " * (n % 7) for n in range(600)]


def encode(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


def local(texts: list[str] = TEXTS, validation: int = 30) -> LocalCorpus:
    return LocalCorpus("texts", len(texts) - validation, validation, texts.__getitem__, "content")


def rows_of(first: list[int]) -> Iterator[dict[str, str]]:
    """Rows of a stream, with one shard for each item of `first`."""
    for begin in first:
        yield from ({"text": text} for text in TEXTS[begin : begin + 200])


def streamed() -> HubCorpus:
    """A data set of three files on the hub, as a new process sees it."""
    return HubCorpus("hub/data", IterableDataset.from_generator(rows_of, gen_kwargs={"first": [0, 200, 400]}), "text")


def write(folder: Path, corpus: Any, **settings: Any) -> TokenFiles:
    folder.mkdir(exist_ok=True)
    shared = {"end_token": END_TOKEN, "vocabulary": 257, "tokenizer": "bytes"}
    return write_token_files(folder, corpus, encode, **{**shared, **settings})


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_files_hold_every_document_and_its_end(tmp_path: Path) -> None:
    files = write(tmp_path / "a", local())
    expected = {
        part: np.array([i for text in texts for i in [*text.encode(), END_TOKEN]])
        for part, texts in ((TRAIN, TEXTS[:570]), (VALIDATION, TEXTS[570:]))
    }
    for part, ids in expected.items():
        assert np.array_equal(np.fromfile(files.path(part), np.uint16), ids)
        assert files.tokens[part] == len(ids)
    assert files.documents == {TRAIN: 570, VALIDATION: 30} and files.dtype == "uint16"
    assert {path.name for path in files.folder.iterdir()} == {"train.bin", "validation.bin", "tokens.json"}


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "a", local(), vocabulary=2**16).dtype == "uint16"
    files = write(tmp_path / "b", local(), vocabulary=2**16 + 1, end_token=2**16)
    assert files.dtype == "uint32" and np.fromfile(files.path(TRAIN), np.uint32).max() == 2**16


class Killed(BaseException):
    """Stands for the end of the process: no files are cleaned up."""


@pytest.mark.parametrize("make", [local, streamed])
def test_a_process_that_ends_anywhere_is_gone_on_with_to_the_same_bytes(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(tmp_path / "whole", make(), limit=9_000)
    # The fsync comes after the write, and the rename after the fsync: this tries every state of the disk in between.
    for operation in count():
        calls = iter(range(operation))

        def stop(function: Any, calls: Iterator[int] = calls) -> Any:
            def call(*args: Any) -> Any:
                if next(calls, None) is None:
                    raise Killed
                return function(*args)

            return call

        folder = tmp_path / str(operation)
        with monkeypatch.context() as patch:
            patch.setattr(token_files.os, "fsync", stop(os.fsync))
            patch.setattr(token_files.os, "replace", stop(os.replace))
            try:
                write(folder, make(), limit=9_000)
                break
            except Killed:
                assert not token_files.is_token_folder(folder)
        write(folder, make(), limit=9_000)
        assert digests(folder) == digests(whole.folder), operation
    assert operation > 8
    assert digests(folder) == digests(whole.folder)


def _slowly(folder: Path) -> None:
    def slow(texts: list[str]) -> list[list[int]]:
        time.sleep(0.02)
        return encode(texts)

    write_token_files(folder, local(TEXTS * 20), slow, end_token=END_TOKEN, vocabulary=257, tokenizer="bytes")


def test_kill_9_at_some_moment_and_the_same_command_again_make_the_same_bytes(tmp_path: Path) -> None:
    whole, folder = write(tmp_path / "whole", local(TEXTS * 20)), tmp_path / "killed"
    folder.mkdir()
    begun = 0
    for _ in range(4):
        process = multiprocessing.get_context("fork").Process(target=_slowly, args=(folder,))
        process.start()
        before = (folder / "train.bin").stat().st_size if begun else 0
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and process.is_alive():
            if (folder / "progress.json").exists() and (folder / "train.bin").stat().st_size > before + 20_000:
                break
            time.sleep(0.002)
        process.kill()
        process.join()
        begun += not token_files.is_token_folder(folder)
    assert begun > 1
    _slowly(folder)
    assert digests(folder) == digests(whole.folder)


def test_the_limit_is_reached_at_the_end_of_a_document(tmp_path: Path) -> None:
    files = write(tmp_path / "a", streamed(), limit=5_000)
    ids = np.fromfile(files.path(TRAIN), np.uint16)
    assert len(ids) >= 5_000 and ids[-1] == END_TOKEN
    assert len(ids) - 1 - np.flatnonzero(ids[:-1] == END_TOKEN)[-1] > len(ids) - 5_000
    # One document in 20 of the stream is for validation; the first of them is the twentieth.
    held_out = np.fromfile(files.path(VALIDATION), np.uint16)
    assert bytes(held_out[: len(TEXTS[19])].astype(np.uint8)).decode() == TEXTS[19]
    assert files.documents[VALIDATION] == (files.documents[TRAIN] + files.documents[VALIDATION]) // 20
    assert not streamed().is_held_out(19, MOST_VALIDATION_TOKENS) and not streamed().is_held_out(18, 0)


def test_unfinished_tokens_of_something_else_are_not_gone_on_with(tmp_path: Path) -> None:
    write(tmp_path / "a", local())
    (tmp_path / "a" / "tokens.json").unlink()
    about = {"source": "texts", "tokenizer": "bytes", "vocabulary": 257, "dtype": "uint16", "limit": 7, "content": "a"}
    rest: dict[str, Any] = {"done": 0, "tokens": {TRAIN: 0, VALIDATION: 0}, "documents": {}, "state": None}
    (tmp_path / "a" / "progress.json").write_text(json.dumps({"about": about, **rest}))
    with pytest.raises(DataError, match=r"other tokens: they differ in limit \(7, here None\), content \(a, here b\)"):
        write(tmp_path / "a", local(), content="b")


def test_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    files = write(tmp_path / "a", local())
    with files.path(TRAIN).open("r+b") as file:
        file.truncate(10)
    with pytest.raises(DataError, match=r"train.bin has 10 bytes, and tokens.json says"):
        read_token_files(files.folder)
    (files.folder / "tokens.json").write_text("{")
    with pytest.raises(DataError, match="tokens.json is missing or damaged"):
        read_token_files(files.folder)


def test_a_tokenizer_that_was_half_written_is_written_again(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        part.mkdir()
        (part / "tokenizer.json").write_text("{")
        raise Killed

    with pytest.raises(Killed):
        save_tokenizer(tmp_path, fail)
    saved = save_tokenizer(tmp_path, lambda part: (part.mkdir(), (part / "a").write_text("b")))
    assert [path.name for path in saved.iterdir()] == ["a"]


def test_windows_are_what_lies_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    ids = np.arange(1000, dtype=np.uint16)
    ids.tofile(path)
    windows = TokenWindows(path, "uint16", 64)
    assert len(windows) == 15  # with 40 tokens left over
    assert [one["input_ids"].tolist() for one in windows] == ids[:960].reshape(15, 64).tolist()  # type: ignore[attr-defined]
    spread = TokenWindows(path, "uint16", 64, most=5)
    assert [int(one["input_ids"][0]) // 64 for one in spread] == [0, 3, 6, 9, 12]  # type: ignore[attr-defined]
    assert len(TokenWindows(path, "uint16", 64, most=50)) == 15
    batch = collate_windows([windows[3], windows[0]])
    assert batch["input_ids"].dtype == torch.int64 and batch.keys() == {"input_ids", "labels"}
    assert torch.equal(batch["labels"], torch.stack([torch.arange(192, 256), torch.arange(64)]))


def test_text_without_a_whole_window_is_refused(tmp_path: Path) -> None:
    files = write(tmp_path / "a", local(validation=1))
    with pytest.raises(DataError, match="validation part of texts has .* fewer than one window of 512"):
        TokenSplits(files, 512)


def test_the_standard_library_is_divided_by_file(tmp_path: Path) -> None:
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "json").mkdir()
    for number in range(40):
        (tmp_path / "json" / f"m{number}.py").write_text(f"x = {number}\n")
    (tmp_path / "site-packages" / "other.py").write_text("other\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "empty.py").write_text("")
    corpus = python_sources(tmp_path)
    texts = list(corpus.documents(0))
    ordered = sorted((hashlib.sha256(f"json/m{n}.py".encode()).hexdigest(), f"x = {n}\n") for n in range(40))
    assert texts == [text for _, text in ordered]
    assert [corpus.is_held_out(n, 0) for n in range(40)] == [False] * 38 + [True] * 2
    assert list(corpus.training_texts()) == texts[:38]
    same = python_sources(tmp_path).content
    (tmp_path / "json" / "m7.py").write_text("x = 8\n")
    assert corpus.content == same != python_sources(tmp_path).content
    with pytest.raises(DataError, match="finds no sources"):
        python_sources(tmp_path / "site-packages")


def test_rows_of_a_file_and_what_is_held_out_of_them(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS[:40], "  "]))
    corpus = text_rows(str(path), "text")
    held_out = {
        text for _, text in sorted((hashlib.sha256(text.encode()).hexdigest(), text) for text in TEXTS[:40])[-2:]
    }
    texts = list(corpus.documents(0))
    assert texts[:38] == [text for text in TEXTS[:40] if text not in held_out] and set(texts[38:]) == held_out
    other = tmp_path / "other.txt"
    other.write_text("One.\n\nTwo.\n")
    given = text_rows(str(path), "text", str(other))
    assert list(given.documents(39)) == [TEXTS[39], "One.", "Two."] and given.content != corpus.content
    assert [given.is_held_out(n, 0) for n in (39, 40, 41)] == [False, True, True]
    with pytest.raises(DataError, match="no column 'body' with text to pretrain on; its columns are 'text'"):
        text_rows(str(path), "body")


def test_a_trained_tokenizer_gives_the_text_back_and_is_the_same_again() -> None:
    texts = [text + "é\n\t" for text in TEXTS]
    tokenizer = train_bpe(iter(texts), 300)
    assert len(tokenizer) == 300 and tokenizer.eos_token == tokenizer.pad_token == END
    ids = tokenizer(texts[3])["input_ids"]
    assert tokenizer.decode(ids) == texts[3] and len(ids) < len(texts[3].encode())
    assert train_bpe(texts, 300).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert vocabulary_of("bpe:300") == 300 and vocabulary_of("gpt2") is None
    for wrong in ("bpe:", "bpe:256", "bpe:-3", "bpe:9999999"):
        with pytest.raises(DataError, match=f"tokenizer is {wrong}, expected a size from 257"):
            vocabulary_of(wrong)
