"""Measures steps with streamed layers beside resident ones: peak on the device, milliseconds, bytes moved, share hidden.

    python benchmarks/offload.py --json offload.json
    python benchmarks/offload.py --dry-run          # a tiny model, on a CPU that plays the device: no figure means anything

Weights are random, and each measurement has a separate process. It fits ten minutes of one GPU with 80 GiB, whose host has
100 GiB for the model of 32B; --shapes leaves that out.

`transfer_ms` is what a step's transfers take at the link's measured speed. `hidden` is the share of it that a streamed step
does not take longer than a resident one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LARGE = "qwen3-32b"
TOKENS = {"llama3.1-8b": [1024, 4096, 8192], LARGE: [4096], "tiny": [32]}
"""Lengths of examples, by the shape of the model."""
GIB = 1 << 30


def main() -> None:
    arguments = parse()
    if arguments.child:
        print(json.dumps(measure(arguments)))
        return
    shapes = ["tiny"] if arguments.dry_run else arguments.shapes
    rows = []
    for shape in shapes:
        for weights in arguments.weights:
            for tokens in TOKENS[shape]:
                # All of a 32B model, resident, takes more than one GPU has.
                for streams in (True,) if shape == LARGE else (False, True):
                    rows.append(run_child(arguments, shape, weights, tokens, streams))
                    print(shown(rows[-1]), flush=True)
    compare(rows)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [shape for shape in TOKENS if shape != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes)
    parser.add_argument("--weights", nargs="+", choices=["bfloat16", "int12", "int8", "int4"], default=["bfloat16", "int8"])
    parser.add_argument("--steps", type=int, default=6, help="measured steps, after two others")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--dry-run", action="store_true", help="try the script on a CPU")
    parser.add_argument("--child", nargs=4, metavar=("SHAPE", "WEIGHTS", "TOKENS", "STREAMS"), help=argparse.SUPPRESS)
    return parser.parse_args()


def run_child(arguments: argparse.Namespace, shape: str, weights: str, tokens: int, streams: bool) -> dict[str, Any]:
    from benchmarks.provenance import provenance

    row = {"shape": shape, "weights": weights, "tokens": tokens, "streams": streams, "failed": None, **provenance()}
    command = [sys.executable, __file__, "--child", shape, weights, str(tokens), str(int(streams))]
    command += ["--steps", str(arguments.steps), *["--dry-run"] * arguments.dry_run]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {**row, "failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return {**row, **json.loads(done.stdout.splitlines()[-1])}


# In the process of one measurement


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import set_seed

    from sbft.models.load import load_model
    from sbft.native.memory import PeakMemory, device_name
    from sbft.planning.memory.offload import decoder_layers, measured_speeds, streaming
    from sbft.recipe import load_recipe, resolve
    from sbft.recipe.offload import Offload
    from sbft.training.arguments import SmallBatchTrainingArguments
    from sbft.training.trainer import SmallBatchTrainer

    shape, weights, tokens, streams = (*arguments.child[:2], int(arguments.child[2]), arguments.child[3] == "1")
    if arguments.dry_run:
        let_the_cpu_play_the_device()
    set_seed(0)
    on_device = torch.cuda.is_available() and not streams
    model = load_model(f"random:{shape}", dtype=torch.bfloat16).to("cuda" if on_device else "cpu")
    layers = int(model.config.get_text_config().num_hidden_layers)
    steps = 2 + arguments.steps
    rows = torch.randint(0, model.config.vocab_size, (steps, tokens), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        args = SmallBatchTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            learning_rate=1e-5,
            logging_steps=steps + 1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=True,
            weights=None if weights == "bfloat16" else weights,
            offload="layers" if streams else None,
        )
        examples = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
        trainer = SmallBatchTrainer(model=model, args=args, train_dataset=examples)
        with PeakMemory() as peak:
            trainer.train()
    recipe = resolve(
        load_recipe(None, [f"weights={weights}"], model=f"random:{shape}", data="my.jsonl", method="sbft")
    )
    moved = streaming(decoder_layers(recipe, model.config, layers, 1), Offload())
    # Both directions at once in backward, of which the way in is the longer.
    link = measured_speeds().link_bytes_per_s if torch.cuda.is_available() else None
    return {
        "device": device_name(),
        "torch": torch.__version__,
        "step_ms": 1e3 * statistics.median(trainer.step_seconds[2:]),
        "step_ms_runs": [1e3 * seconds for seconds in trainer.step_seconds[2:]],
        "peak_bytes": peak.peak_bytes,
        "memory_kind": peak.kind,
        "link_bytes_per_s": link,
        "moved_bytes": moved.moved_in_bytes + moved.moved_out_bytes if streams else 0,
        "transfer_ms": 1e3 * moved.moved_in_bytes / link if streams and link else None,
    }


def let_the_cpu_play_the_device() -> None:
    from sbft.training.offload import link
    from sbft.training.offload.stand_in import StandIn

    link.link_to = lambda device: StandIn()  # type: ignore[assignment]


# The table


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each streamed row how it compares with its resident one, and print that."""
    for row in rows:
        same = [other for other in rows if not other["streams"] and not other["failed"]]
        same = [other for other in same if all(other[key] == row[key] for key in ("shape", "weights", "tokens"))]
        if not row["streams"] or row["failed"] or not same:
            continue
        row["step_ratio"] = row["step_ms"] / same[0]["step_ms"]
        line = f"{row['shape']} {row['weights']} {row['tokens']} tokens: streamed / resident {row['step_ratio']:.2f}"
        if row["transfer_ms"]:
            row["hidden"] = 1 - max(row["step_ms"] - same[0]["step_ms"], 0) / row["transfer_ms"]
            line += f", {100 * row['hidden']:.0f} % of transfers hidden"
        print(line)


def shown(row: dict[str, Any]) -> str:
    where = "streamed" if row["streams"] else "resident"
    start = f"{row['shape']} {row['weights']} {row['tokens']} tokens, {where}: "
    if row["failed"]:
        return start + row["failed"]
    speed = row["moved_bytes"] / (row["step_ms"] / 1e3) / 1e9
    return start + f"{row['step_ms']:.0f} ms, peak {row['peak_bytes'] / GIB:.2f} GiB, {speed:.1f} GB/s moved"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
