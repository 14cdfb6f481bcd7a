"""Measures a training step at batch size 1 (forward, backward, update) of several methods: time and peak memory.

    python benchmarks/training_step.py --model builtin:smollm2-135m --tokens 64 512 --json training_step.json

Each measurement has a separate process, so that memory is measured separately. The methods alternate, so that all meet the
same load on a shared machine. All see the same examples, with every token in the loss. `above_model` is the peak of the
training loop above what the process held once the bare model was loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METHODS = {
    "sbft": "Adafactor, bf16 + stochastic rounding, released, all weights",
    "sbft-one-by-one": "sbft, every update launched on its own",
    "sbft-graphs": "sbft, its steps launched as CUDA graphs",
    "sbft-float32": "sbft with float32 weights",
    "sbft-frozen-embeddings": "sbft, input and output embeddings frozen: the layers that LoRA trains",
    "lora": "PEFT LoRA r=16 on all linear layers, torch AdamW, the same loss without logits",
    "qlora": "as lora, the linear layers held in 4 bits (bitsandbytes' NF4)",
    "sbft-int12": "as sbft, weights in 12 bits",
    "sbft-int8": "as sbft, weights in 8 bits",
    "sbft-int4": "as sbft, weights in 4 bits",
    "lora-model-loss": "the same with the model's own loss, which holds the logits of all tokens",
    "adam": "torch AdamW, float32 weights, the same loss without logits",
}
GRIDS = ("sbft-int12", "sbft-int8", "sbft-int4")
INSTRUCTIONS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Variables that make a CPU do without some of its instructions, like an older one."""
MEBIBYTE = 1 << 20


def main() -> None:
    arguments = parse()
    if arguments.child:
        print(json.dumps(measure(arguments)))
        return
    rows = []
    for tokens in arguments.tokens:
        runs: dict[str, list[dict[str, Any]]] = {method: [] for method in arguments.methods}
        for _ in range(arguments.repeats):
            for method in arguments.methods:
                runs[method].append(run_child(arguments, method, tokens))
        rows += [summarise(arguments, method, tokens, of_method) for method, of_method in runs.items()]
    show(rows)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2-135m", help="as in a recipe, or the NAME of a random:NAME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 512], help="length of every example")
    parser.add_argument("--steps", type=int, default=12, help="measured steps per process, after --warm-up others")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="processes per method")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_child(arguments: argparse.Namespace, method: str, tokens: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", "--model", arguments.model, "--methods", method]
    command += ["--tokens", str(tokens), "--steps", str(arguments.steps), "--warm-up", str(arguments.warm_up)]
    command += ["--checkpointing"] * arguments.checkpointing
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"failed": reason[:300]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


# In the process of one measurement


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import set_seed

    from sbft.native.memory import PeakMemory, device_name
    from sbft.training.arguments import SmallBatchTrainingArguments
    from sbft.training.trainer import SmallBatchTrainer

    (method,), (tokens,) = arguments.methods, arguments.tokens
    set_seed(0)
    dtype = torch.float32 if method in ("adam", "sbft-float32") else torch.bfloat16
    model = load(arguments.model, dtype, "nf4" if method == "qlora" else None)
    with PeakMemory() as loaded:
        pass
    parameters = sum(p.numel() for p in model.parameters())
    own = {"token_optimizer": "adafactor"} if method.startswith("sbft") else {"token_optimizer": None}
    if method == "sbft-frozen-embeddings":
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.weight.requires_grad_(False)
    if "lora" in method:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapter)
    with tempfile.TemporaryDirectory() as folder:
        steps = arguments.warm_up + arguments.steps
        args = SmallBatchTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            learning_rate=1e-5,
            logging_steps=steps + 1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=arguments.checkpointing,
            logits_free_loss=method != "lora-model-loss",
            cuda_graphs=method == "sbft-graphs",
            cast_weights=method != "sbft-float32",
            weights=method.removeprefix("sbft-") if method in GRIDS else None,
            **own,
        )
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.get_text_config().vocab_size
        rows = torch.randint(0, vocabulary, (steps, tokens), generator=generator)
        examples = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
        trainer = SmallBatchTrainer(model=model, args=args, train_dataset=examples)
        if method == "sbft-one-by-one":
            trainer.create_optimizer().most_waiting_bytes = 0
        with PeakMemory() as peak:
            trainer.train()
    seconds = trainer.step_seconds[arguments.warm_up :]
    return {
        "device": device_name(),
        "torch": torch.__version__,
        "parameters": parameters,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "step_ms": 1e3 * statistics.median(seconds),
        "optimizer_ms": 1e3 * statistics.median(trainer.optimizer_seconds[arguments.warm_up :]),
        "peak_bytes": peak.peak_bytes,
        "memory_kind": peak.kind,
        "above_model_bytes": peak.peak_bytes - loaded.baseline_bytes,
    }


def load(name: str, dtype: Any, quantization: Any) -> Any:
    import torch

    from sbft.models.load import load_model
    from sbft.models.random_weights import ARCHITECTURES, PREFIX

    model = load_model(PREFIX + name if name in ARCHITECTURES else name, dtype=dtype, quantization=quantization)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


# The table


def summarise(arguments: argparse.Namespace, method: str, tokens: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    from benchmarks.provenance import provenance

    row: dict[str, Any] = {"method": method, "model": arguments.model, "tokens": tokens, "steps": arguments.steps}
    row |= {"checkpointing": arguments.checkpointing, "failed": None}
    row |= provenance()
    row |= {"instructions": {name: os.environ[name] for name in INSTRUCTIONS if name in os.environ}}
    failed = [run["failed"] for run in runs if "failed" in run]
    if failed:
        return {**row, "failed": failed[0]}
    row |= {key: runs[0][key] for key in ("device", "torch", "parameters", "trainable_parameters", "memory_kind")}
    for key in ("step_ms", "optimizer_ms", "peak_bytes", "above_model_bytes"):
        values = [run[key] for run in runs]
        row[key] = statistics.median(values)
        row[f"{key}_runs"] = values
    return row


def show(rows: list[dict[str, Any]]) -> None:
    head = ["method", "tokens", "step ms", "update ms", "peak MiB", "above model MiB", "step / lora", "above / lora"]
    lines = [head]
    for row in rows:
        if row["failed"]:
            lines.append([row["method"], str(row["tokens"]), row["failed"], *[""] * 5])
            continue
        lora = next((r for r in rows if (r["method"], r["tokens"], r["failed"]) == ("lora", row["tokens"], None)), None)
        ratios = ["", ""] if lora is None else [
            f"{row[key] / lora[key]:.2f}" for key in ("step_ms", "above_model_bytes")
        ]  # fmt: skip
        figures = [f"{row['step_ms']:.0f}", f"{row['optimizer_ms']:.0f}"]
        figures += [f"{row[key] / MEBIBYTE:.0f}" for key in ("peak_bytes", "above_model_bytes")]
        lines.append([row["method"], str(row["tokens"]), *figures, *ratios])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
