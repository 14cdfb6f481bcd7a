"""Download the data of the suites math-gemma3 and metamath-gsm8k from the hub, and write it in the form that they read.

python scripts/prepare_math_data.py math          data/math/{train,validation,test}.jsonl
python scripts/prepare_math_data.py metamath      data/metamath/{train,validation,test}.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

MATH, MATH_PARTS = "EleutherAI/hendrycks_math", (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip
METAMATH, GSM8K = "meta-math/MetaMathQA", "openai/gsm8k"
MATH_VALIDATION, GSM8K_VALIDATION = 250, 200
LONGEST = 1300
"""Longest question and answer, in characters, as in PEFT's comparison; longer ones hardly fit in 768 tokens."""


def math_parts(train: Iterable[Row], test: Iterable[Row]) -> dict[str, list[Row]]:
    """MATH with the paper's prompt; problems that are also in the test part are left out of training."""
    test_rows = [_problem(row) for row in test]
    asked = {_plain(row["prompt"]) for row in test_rows}
    rest = [row for row in map(_problem, train) if _plain(row["prompt"]) not in asked]
    random.Random(0).shuffle(rest)
    held_out = rest[:MATH_VALIDATION]
    asked = {_plain(row["prompt"]) for row in held_out}
    kept = [row for row in rest[MATH_VALIDATION:] if _plain(row["prompt"]) not in asked]
    return {"train": kept, "validation": held_out, "test": test_rows}


def _problem(row: Row) -> Row:
    return {"prompt": f"Problem: {row['problem']}\nSolution: ", "completion": row["solution"]}


def metamath_parts(train: Iterable[Row], gsm8k_train: Iterable[Row], gsm8k_test: Iterable[Row]) -> dict[str, list[Row]]:
    """MetaMathQA as whole texts, GSM8K as questions; those questions, rewritten or not, are left out of training."""
    problems = list(gsm8k_train)
    random.Random(0).shuffle(problems)
    held_out, test = problems[:GSM8K_VALIDATION], list(gsm8k_test)
    asked = {_plain(row["question"]) for row in (*held_out, *test)}
    kept = [
        {"text": _question(row["query"]) + row["response"]}
        for row in train
        if len(f"{row['query']} {row['response']}") <= LONGEST
        and not {_plain(row["query"]), _plain(row["original_question"])} & asked
    ]

    def answered(rows: list[Row]) -> list[Row]:
        return [{"prompt": _question(row["question"]), "completion": row["answer"]} for row in rows]

    return {"train": kept, "validation": answered(held_out), "test": answered(test)}


def _question(text: str) -> str:
    return f"Question: {text} Think step by step.\nAnswer:"


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def main() -> None:
    """Download, split and write the data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["math", "metamath"])
    parser.add_argument("--output-dir", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    from datasets import concatenate_datasets, load_dataset

    if arguments.which == "math":
        train, test = (
            concatenate_datasets([load_dataset(MATH, part, split=split) for part in MATH_PARTS])
            for split in ("train", "test")
        )
        parts = math_parts(train, test)
    else:
        gsm8k = load_dataset(GSM8K, "main")
        parts = metamath_parts(load_dataset(METAMATH, split="train"), gsm8k["train"], gsm8k["test"])
    folder = arguments.output_dir / arguments.which
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
