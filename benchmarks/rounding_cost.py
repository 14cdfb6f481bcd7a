"""Measures what rounding a model's weights to a grid costs before any training: the loss on texts, for each format.

    python scripts/fetch_manpages.py --to data/manpages
    python benchmarks/rounding_cost.py --data data/manpages/en/test.jsonl --json rounding_cost.json

All weights in a format at first, and QLoRA's NF4 (linear layers alone) beside them; then one kind of matrix at a time in
the format of --kinds, the rest in bfloat16: which of them are the sensitive ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMATS = ("bfloat16", "int12", "int8", "int8/32", "int6", "int4", "int4/64", "nf4")
KINDS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    arguments = parse()
    from benchmarks.provenance import provenance
    from sbft.data.collate import Collator
    from sbft.evaluation.likelihood import evaluate_loss, pad_token
    from sbft.models.load import load_tokenizer

    tokenizer = load_tokenizer(arguments.model)
    lines = arguments.data.read_text(encoding="utf-8").splitlines()[: arguments.texts]
    ids = [tokenizer(json.loads(line)["text"])["input_ids"][: arguments.tokens] for line in lines]
    rows = [{"input_ids": each, "labels": each} for each in ids]
    counted = sum(len(each) - 1 for each in ids)
    measured = []
    for name, weights in cases(arguments.kinds):
        model, sizes = load(arguments.model, weights)
        loss = evaluate_loss(model, rows, Collator(pad_token(tokenizer)), batch_size=1)["loss"]
        above = loss - measured[0]["loss"] if measured else 0.0
        measured.append({"weights": name, "loss": loss, "above_bfloat16": above, **sizes})
        print(f"{name:28} {loss:7.4f} {above:+8.4f}  {sizes['bytes_per_weight']:.3f} bytes a weight", flush=True)
    if arguments.json:
        content = {"model": arguments.model, "tokens": counted, "rows": measured, **provenance()}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m", help="as in a recipe")
    parser.add_argument("--data", type=Path, required=True, help="JSONL file with a text in each line")
    parser.add_argument("--texts", type=int, default=100, help="how many of them")
    parser.add_argument("--tokens", type=int, default=512, help="the first tokens of each text")
    parser.add_argument("--kinds", default="int4", help="format of one kind of matrix at a time")
    parser.add_argument("--json", type=Path, help="write the rows here")
    return parser.parse_args()


def cases(kinds: str) -> Iterator[tuple[str, str | dict[str, str]]]:
    for name in FORMATS:
        yield name, name
    for kind in KINDS:
        yield f"{kind} in {kinds}", {"default": "bfloat16", kind: kinds}
    yield f"{kinds}, embeddings in int8", {"default": kinds, "embed_tokens": "int8"}


def load(name: str, weights: str | dict[str, str]) -> tuple[Any, dict[str, float]]:
    """The model, and bytes per weight over all of it."""
    import torch

    from sbft.grid.convert import put_on_grids
    from sbft.models.load import load_model
    from sbft.native.memory import stored_tensors

    model = load_model(name, dtype=torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    if weights == "nf4":
        model = load_model(name, dtype=torch.bfloat16, quantization="nf4")
    elif weights != "bfloat16":
        put_on_grids(model, weights)
    stored = sum(tensor.nbytes for parameter in model.parameters() for tensor in stored_tensors(parameter))
    return model, {"bytes_per_weight": stored / count}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
