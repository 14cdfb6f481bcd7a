"""Compares predicted with measured peak memory: each row is trained in a separate process, and predicted.

    python benchmarks/memory_prediction.py --json memory_prediction.json [--only smollm2 sbft]
    python benchmarks/memory_prediction.py --json memory_prediction.json --large --jobs 3   # on a GPU of 80 GB

On a CPU, this compares the peak of resident memory above what the process held when the loop began, with its model
loaded. On CUDA it compares the peak of allocated memory. There, several rows may be measured at once, since each counts
what it allocates itself. With `--again FILE`, the measurements of an earlier run are predicted again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

MEBIBYTE = 1 << 20
STEPS = 4
STEPS_OF_MANY_LENGTHS = 24
SHORTEST = 16  # of the many lengths

RANDOM = "random:"
METHODS = ("sbft", "sgd", "adam", "adam-accum", "adam-batch", "adam8bit", "hf-adafactor", "lora", "qlora")
_COMMON = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
# Real architectures, made small; the vocabulary of Gemma 3 stays large in comparison.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-untied": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": False,
    },
    "llama": {
        "model_type": "llama", **_COMMON, "intermediate_size": 1792, "vocab_size": 32768, "tie_word_embeddings": False,
    },
    "qwen3": {
        "model_type": "qwen3", **_COMMON, "head_dim": 128, "intermediate_size": 1536, "vocab_size": 65536,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text", **_COMMON, "head_dim": 128, "intermediate_size": 2048, "vocab_size": 131072,
        "sliding_window": 128, "tie_word_embeddings": True, "layer_types": ["sliding_attention"] * 5
        + ["full_attention"] + ["sliding_attention"] * 2,
    },
    "mixtral": {
        "model_type": "mixtral", **_COMMON, "intermediate_size": 896, "num_local_experts": 4, "num_experts_per_tok": 2,
        "vocab_size": 32768, "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One training run."""

    shape: str
    method: str
    tokens: int
    checkpointing: bool = False
    varied: bool = False
    """Whether examples have any length from `SHORTEST` to `tokens`, not all the same."""

    @property
    def name(self) -> str:
        """The settings in words."""
        return (
            f"{self.shape} {self.method} {self.tokens}{' checkpointing' * self.checkpointing}{' varied' * self.varied}"
        )


ROWS = [
    *(Row("smollm2", method, tokens) for tokens in (64, 256) for method in METHODS if method != "qlora"),
    *(
        Row("smollm2", method, 1024, checkpointing)
        for method in ("sbft", "lora", "adam")
        for checkpointing in (False, True)
    ),
    *(Row("smollm2", method, 1024) for method in ("sgd", "adam-accum", "adam8bit", "hf-adafactor")),
    Row("smollm2", "sgd", 1024, True),
    *(Row("smollm2", method, 256, True) for method in ("sbft", "lora", "adam")),
    *(Row("smollm2-untied", method, tokens) for method in ("sbft", "lora", "adam") for tokens in (64, 1024)),
    *(Row("smollm2-untied", method, 64) for method in ("sgd", "adam-accum", "adam8bit", "hf-adafactor")),
    *(Row("smollm2-untied", method, 256) for method in ("sbft", "lora")),
    Row("smollm2-untied", "sbft", 1024, True),
    *(
        Row(shape, method, 256)
        for shape in ("llama", "qwen3", "gemma3", "mixtral")
        for method in ("sbft", "lora", "adam")
    ),
    # Only a checkpoint can be held in 4 bits, not random weights.
    Row("llama", "qlora", 256),
    *(Row("smollm2-untied", "qlora", tokens) for tokens in (64, 256, 1024)),
    Row("smollm2-untied", "qlora", 1024, True),
    Row("smollm2", "adam-batch", 1024),
    *(Row("smollm2", method, 256, varied=True) for method in ("sbft", "lora", "adam")),
    Row("smollm2", "sbft", 1024, varied=True),
]
# In an order in which any three in progress fit in 80 GB together.
LARGE_ROWS = [
    Row("llama-8b", "sbft", 1024),
    Row("llama-8b", "lora", 1024),
    *(Row("llama-1b", method, 1024, checkpointing) for checkpointing in (False, True) for method in ("sbft", "lora")),
    Row("llama-8b", "sbft", 1024, True),
    Row("qwen3-4b", "sbft", 1024),
    Row("gemma3-4b", "sbft", 1024),
    Row("llama-1b", "adam", 1024),
    Row("qwen3-4b", "lora", 1024),
    Row("gemma3-4b", "lora", 1024),
    *(Row("llama-1b", method, 1024) for method in ("adam8bit", "hf-adafactor")),
    Row("llama-8b", "sgd", 1024),
    Row("llama-1b", "sbft", 4096),
]
"""Models with billions of weights, for a GPU."""


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        again = arguments.again
        results = json.loads(again.read_text()) if again else measure_all(arguments, Path(folder))
        if arguments.measure_only:
            return
        for result in results:
            result.update(predict(result, Path(folder)))
    write(arguments.json, results)
    show(results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="rows whose names have all of these words")
    parser.add_argument("--large", action="store_true", help="the rows with billions of weights, for a GPU")
    parser.add_argument("--jobs", type=int, default=1, help="rows to measure at once, on a GPU that has room for them")
    parser.add_argument("--measure-only", action="store_true", help="leave the predictions to --again")
    parser.add_argument("--again", type=Path, help="predict the rows measured in this file")
    parser.add_argument("--json", type=Path, required=True, help="write measurements and predictions here")
    return parser.parse_args()


def write(path: Path, results: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def measure_all(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    rows = [
        row for row in (LARGE_ROWS if arguments.large else ROWS) if all(w in row.name.split() for w in arguments.only)
    ]
    for shape in {row.shape for row in rows}:
        model_of(shape, folder)  # or two rows measured at once would both write it
    results: dict[int, dict[str, Any]] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        waiting = {pool.submit(measure, row, folder): i for i, row in enumerate(rows)}
        for done in as_completed(waiting):
            results[waiting[done]] = {**asdict(rows[waiting[done]]), **done.result()}
            write(arguments.json, [results[i] for i in sorted(results)])  # a run that is stopped keeps what it has
    return [results[i] for i in sorted(results)]


def recipe_of(row: Row, model: str) -> dict[str, Any]:
    size = 4 if row.method == "adam-batch" else 1
    accumulation = 2 if row.method in ("adam-accum", "adam8bit") else 1
    shortest = {"shortest": SHORTEST} if row.varied else {}
    steps = STEPS_OF_MANY_LENGTHS if row.varied else STEPS
    return {
        "model": model,
        "method": row.method,
        "data": {
            "train": "generated:random_text",
            "options": {"length": row.tokens, **shortest},
            "max_length": row.tokens,
            "train_size": steps * size * accumulation,
        },
        "training": {
            "learning_rate": 1e-6,
            "gradient_checkpointing": row.checkpointing,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
        },
        "evaluation": {"before": False},
        "save_model": False,
    }


def measure(row: Row, folder: Path) -> dict[str, Any]:
    model = model_of(row.shape, folder)
    name = row.name.replace(" ", "-")
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump({**recipe_of(row, model), "output_dir": str(folder / name)}))
    command = [sys.executable, "-W", "ignore", "-m", "sbft", "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stdout + done.stderr)[-600:]}
    from benchmarks.provenance import provenance

    record = json.loads((folder / name / "run.json").read_text())
    memory = record["memory"]
    return {
        "failed": None,
        "device": record["device"],
        **provenance(),
        "memory_kind": record["memory_kind"],
        "peak_bytes": record["peak_memory_bytes"],
        "baseline_bytes": memory["baseline"],
        "measured_bytes": record["peak_memory_bytes"]
        - (memory["baseline"] if record["memory_kind"] == "resident" else 0),
    }


def model_of(shape: str, folder: Path) -> str:
    """The name in a recipe of the model with this shape."""
    if shape in SHAPES:
        return str(checkpoint(shape, folder))
    from sbft.models.random_weights import ARCHITECTURES

    return RANDOM + (shape if shape in ARCHITECTURES else "smollm2-135m")


def checkpoint(shape: str, folder: Path) -> Path:
    """A folder with a model of random weights and a tokenizer of bytes."""
    path = folder / shape
    if not path.exists():
        import torch
        from transformers import AutoModelForCausalLM

        from sbft.models.random_weights import byte_tokenizer

        AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
    return path


def config_of(shape: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        **SHAPES[shape], max_position_embeddings=4096, bos_token_id=256, eos_token_id=257, pad_token_id=258
    )


def predict(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    from sbft.models.load import load_config
    from sbft.planning.check.length import row_sizes
    from sbft.planning.memory.predict import predict_recipe
    from sbft.recipe import load_recipe, resolve
    from sbft.runs.prepare import prepare
    from sbft.runs.record import git_commit

    if result["failed"]:
        return {}
    row = Row(**{name: result[name] for name in Row.__dataclass_fields__})
    path = folder / "recipe.yaml"
    # A checkpoint is not needed for its config.
    model = RANDOM + "smollm2-135m" if row.shape in SHAPES else model_of(row.shape, folder)
    path.write_text(yaml.safe_dump({**recipe_of(row, model), "output_dir": str(folder / "planned")}))
    recipe = resolve(load_recipe(path))
    sizes = row_sizes(prepare(recipe))._asdict()
    kind = "cuda" if result["memory_kind"] == "cuda_allocated" else "cpu"
    config = config_of(row.shape) if row.shape in SHAPES else load_config(model)
    prediction = predict_recipe(recipe, **sizes, device=kind, config=config)
    predicted = prediction.above_model_bytes if kind == "cpu" else prediction.peak_bytes
    return {
        "predicted_git_commit": git_commit(),
        "predicted_bytes": predicted,
        "error": predicted / result["measured_bytes"] - 1,
        "phase": prediction.phase,
        "parts": prediction.parts,
    }


def show(results: list[dict[str, Any]]) -> None:
    """Print the table of benchmarks/README.md."""
    print(
        "| shape | method | tokens | | measured, MiB | predicted | error |", "|---|---|---|---|---|---|---|", sep="\n"
    )
    for result in results:
        how = ", ".join(["checkpointing"] * result["checkpointing"] + ["many lengths"] * result["varied"])
        name = f"| {result['shape']} | {result['method']} | {result['tokens']} | {how} |"
        if result["failed"]:
            print(name, result["failed"].strip().splitlines()[-1], "| | |")
            continue
        measured, predicted = (result[f"{key}_bytes"] / MEBIBYTE for key in ("measured", "predicted"))
        print(f"{name} {measured:.0f} | {predicted:.0f} | {result['error']:+.1%} |")
    errors = [abs(result["error"]) for result in results if not result["failed"]]
    if errors:
        print(f"\n{len(errors)} rows, median error {statistics.median(errors):.1%}, largest {max(errors):.1%}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
