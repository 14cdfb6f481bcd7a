#!/usr/bin/env python
"""Reads data of extreme sizes: rows, seconds, rise to the peak of memory, and whether the counts are right.

    python tests/faults/data.py --output benchmarks/results/faults/data.json

Each case writes a file, which a process of its own reads and tokenises as `sbft train` does. The counts that the report
must give follow from the lengths of the rows: the tokenizer makes one token of each character.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would not survive a fork

MAX_LENGTH = 1_024
LONG = 200_000


@dataclass(frozen=True)
class Case:
    """A file: its name, and the lengths of its rows in tokens, the end token included."""

    file: str
    lengths: Callable[[], Iterator[int]]
    max_length: int = MAX_LENGTH
    packing: bool = False


def cases(rows: int) -> dict[str, Case]:
    """All cases; the files with many rows have `rows` of them."""

    def short() -> Iterator[int]:
        # Most are short, some empty, a few too long.
        return (0 if n % 1_000 == 7 else 1_500 if n % 10_000 == 3 else 3 + n % 10 for n in range(rows))

    return {
        "many rows, jsonl": Case("many.jsonl", short),
        "many rows, jsonl, packed": Case("many.jsonl", short, packing=True),
        "many rows, csv": Case("many.csv", short),
        "many rows, parquet": Case("many.parquet", short),
        "many rows, txt": Case("many.txt", short),
        "one row": Case("one.jsonl", lambda: iter([12])),
        "rows of one token and the end": Case("tiny.jsonl", lambda: iter([2] * 1_000)),
        "rows of 200,000 tokens": Case("long.jsonl", lambda: iter([LONG] * 20), max_length=LONG),
        "rows of 200,000 tokens, cut": Case("long.jsonl", lambda: iter([LONG] * 20)),
        "rows of 200,000 tokens, csv": Case("long.csv", lambda: iter([LONG] * 20), max_length=LONG),
        "one row of 200,000 among many": Case(
            "mixed.jsonl", lambda: (LONG if n == 5_000 else 20 for n in range(10_000)), max_length=LONG
        ),
    }


def expected(case: Case) -> dict[str, int]:
    """The counts that the report must give, by arithmetic."""
    kept = [length for length in case.lengths() if length]
    return {
        "examples": len(kept),
        "tokens": sum(min(length, case.max_length) for length in kept),
        "completion_tokens": sum(min(length, case.max_length) - 1 for length in kept),
        "truncated": sum(length > case.max_length for length in kept),
        "longest": max(min(length, case.max_length) for length in kept),
        "empty": 0 if case.file.endswith(".txt") else sum(1 for length in case.lengths() if not length),
        "dropped": 0,
    }


def write(case: Case, folder: Path) -> Path:
    """Write the file of a case."""
    path = folder / case.file
    if path.exists():
        return path
    # A row of `length` tokens has one character fewer: the end token is added.
    texts = (
        "" if not length else f"{n:x}".rjust(length - 1, "x")[-(length - 1) :]
        for n, length in enumerate(case.lengths())
    )
    if path.suffix == ".parquet":
        _write_parquet(path, texts)
        return path
    with path.open("w") as lines:
        if path.suffix == ".csv":
            lines.write("text,other\n")
        for text in texts:
            if path.suffix == ".jsonl":
                lines.write(json.dumps({"text": text}) + "\n")
            elif path.suffix == ".csv":
                lines.write(f"{text},1\n")
            elif text:
                lines.write(f"{text}\n\n")
    return path


def _write_parquet(path: Path, texts: Iterator[str]) -> None:
    from itertools import islice

    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        while chunk := list(islice(texts, 100_000)):
            writer.write_table(pa.table({"text": chunk}))


def measure(path: Path, max_length: int, packing: bool) -> dict[str, Any]:
    """Read and tokenise a file in this process."""
    from sbft.data.format import format_dataset
    from sbft.data.sources import load_splits
    from sbft.models.random_weights import byte_tokenizer
    from sbft.native.memory import PeakMemory

    tokenizer = byte_tokenizer()
    format_dataset(load_splits(train="generated:random_text", train_size=2).train, tokenizer)  # imports, buffers
    begin = time.perf_counter()
    with PeakMemory("cpu") as peak:
        splits = load_splits(train=str(path))
        read_s = time.perf_counter() - begin
        examples, report = format_dataset(splits.train, tokenizer, max_length=max_length, packing=packing)
        seconds = time.perf_counter() - begin
        above = peak.peak_bytes - peak.baseline_bytes
    return {
        "rows": splits.train.num_rows,
        "rows_of_examples": examples.num_rows,
        "read_s": round(read_s, 2),
        "total_s": round(seconds, 2),
        "peak_above_start_bytes": above,
        "note": peak.note,
        "report": asdict(report),
    }


def _child(path: Path, case: Case, cache: Path, answer: Any) -> None:
    os.environ["SBFT_CACHE"] = str(cache)
    try:
        answer.put(measure(path, case.max_length, case.packing))
    except Exception as error:
        answer.put({"failed": f"{type(error).__name__}: {error}"})


def _in_a_process(path: Path, case: Case, cache: Path) -> dict[str, Any]:
    forked = multiprocessing.get_context("fork")
    answer = forked.SimpleQueue()
    process = forked.Process(target=_child, args=(path, case, cache, answer))
    process.start()
    process.join()
    return {"failed": f"exit code {process.exitcode}"} if answer.empty() else dict(answer.get())


def main() -> None:
    """Measure all cases, print a line for each, write them as JSON; exit code 1 if a count is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000, help="of the files with many")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--folder", type=Path, help="for the files, which are kept there; else a temporary one")
    parser.add_argument("--output", type=Path, help="JSON file")
    chosen = parser.parse_args()
    import sbft.data.format  # noqa: F401, once, not in each process
    import sbft.native.memory  # noqa: F401

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, case in cases(chosen.rows).items():
            if chosen.only not in name:
                continue
            path = write(case, folder)
            result = _in_a_process(path, case, folder / "cache")
            wanted = expected(case)
            found = result.get("report", {})
            result["counts_right"] = all(found.get(key) == value for key, value in wanted.items())
            results[name] = {"file_bytes": path.stat().st_size, "max_length": case.max_length, **result}
            print(
                f"{name}: {result.get('rows')} rows in {result.get('total_s')} s, peak "
                f"{result.get('peak_above_start_bytes', 0) / 2**20:.0f} MiB above the start, counts "
                f"{'right' if result['counts_right'] else f'WRONG: {result}, expected {wanted}'}",
                flush=True,
            )
            if chosen.output is not None:
                chosen.output.parent.mkdir(parents=True, exist_ok=True)
                chosen.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(result["counts_right"] for result in results.values()) else 1)


if __name__ == "__main__":
    main()
