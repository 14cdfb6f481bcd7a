"""Times steps of pretraining a small model on a GPU: kernel by kernel, and as CUDA graphs (`optimizer.cuda_graphs`).

    python benchmarks/graphed_steps.py --model scratch:30m --json graphed_steps.json

Each row is the median wall-clock time of a run's steps after the first ones. What the GPU computes in a step is
measured in a second, short run under torch's profiler. That is done after all times are taken: once the profiler was
used, launches of its process are slower. The difference between the two times is the host's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

WARM_UP, PROFILED = 20, 12
METHODS = {"adam": "float32", "sbft": "bfloat16", "sgd": "float32", "muon": "float32", "sinkgd": "float32"}
"""The dtype of the weights, by method."""
GRAPHS = ("optimizer.cuda_graphs=true", "optimizer.gradient_release=true")


def main() -> None:
    arguments = parse()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("graphed_steps.py: torch sees no CUDA device here")
    from benchmarks.provenance import provenance

    made = provenance()
    rows: list[dict[str, Any]] = []
    for method in arguments.methods:
        for graphs in (False, True):
            rows.append({**time_steps(arguments, method, graphs), **made})
            write(arguments.json, rows)
    for row in rows:
        row.update(count_kernels(arguments, row["method"], row["graphs"]))
        write(arguments.json, rows)
    show(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scratch:30m")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100, help=f"steps measured, after {WARM_UP} others")
    parser.add_argument("--tf32", action="store_true", help="products of float32 in TF32")
    parser.add_argument("--json", type=Path, help="write the rows here")
    return parser.parse_args()


def write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Write the rows so far, so that a run that is stopped keeps them."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")


def time_steps(arguments: argparse.Namespace, method: str, graphs: bool) -> dict[str, Any]:
    import torch

    from sbft.native.memory import device_name

    with tempfile.TemporaryDirectory() as folder:
        trainer = make(arguments, method, graphs, WARM_UP + arguments.steps, folder)
        trainer.train()
        torch.cuda.synchronize()
    seconds = trainer.step_seconds[WARM_UP:]
    return {
        "model": arguments.model, "batch_size": arguments.batch_size, "length": arguments.length, "method": method,
        "dtype": METHODS[method], "tf32": arguments.tf32, "graphs": graphs, "device": device_name(),
        "torch": torch.__version__, "step_ms": 1e3 * statistics.median(seconds),
        "tenth_ms": 1e3 * sorted(seconds)[len(seconds) // 10],
    }  # fmt: skip


def count_kernels(arguments: argparse.Namespace, method: str, graphs: bool) -> dict[str, float]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder:
        trainer = make(arguments, method, graphs, PROFILED, folder)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            trainer.train()
            torch.cuda.synchronize()
    kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "gpu_ms": sum(kernel.device_time_total for kernel in kernels) / PROFILED / 1e3,
        "kernels": len(kernels) / PROFILED,
    }


def make(arguments: argparse.Namespace, method: str, graphs: bool, steps: int, folder: str) -> Any:
    from transformers.trainer_callback import PrinterCallback

    from sbft.data.windows import collate_windows
    from sbft.recipe import load_recipe, resolve
    from sbft.runs.build import prepare_model
    from sbft.runs.prepare import prepare
    from sbft.training.trainer import SmallBatchTrainer

    settings = [
        f"data.max_length={arguments.length}", f"training.max_steps={steps}", f"dtype={METHODS[method]}",
        f"training.per_device_train_batch_size={arguments.batch_size}", f"output_dir={folder}",
        *(["training.tf32=true"] if arguments.tf32 else []), *(GRAPHS if graphs else ()),
    ]  # fmt: skip
    recipe = resolve(load_recipe(None, settings, model=arguments.model, data="builtin:python-stdlib", method=method))
    prepared = prepare(recipe)
    trainer = SmallBatchTrainer(
        model=prepare_model(recipe, prepared.tokenizer),
        args=prepared.arguments,
        train_dataset=prepared.examples,
        data_collator=collate_windows,
        processing_class=prepared.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table of benchmarks/README.md."""
    print(
        "| method | weights | step, ms | as graphs, ms | ratio | of that on the GPU, ms |",
        "|---|---|---|---|---|---|",
        sep="\n",
    )
    for plain, graphs in zip(rows[::2], rows[1::2], strict=True):
        ratio = plain["step_ms"] / graphs["step_ms"]
        print(
            f"| {plain['method']} | {plain['dtype']} | {plain['step_ms']:.1f} | {graphs['step_ms']:.1f} | {ratio:.1f} | "
            f"{graphs['gpu_ms']:.1f} |"
        )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
