"""The half-life rule beyond language: an image classifier and a forecaster, at batch size 1 and at a reference batch.

    python benchmarks/lab/beyond_language.py --output runs/beyond-language --jobs 2

Every example counts as one token of the optimizer's clock. At the reference batch, the second moment has its usual
decay, and its half-life in examples follows from that. At batch size 1, either the half-life is kept (the rule), or the
decay factor per step is. Each row's learning rate is chosen on validation data over a grid of the same
width, then measured with each seed on test data. Results are written to OUTPUT/runs.jsonl as they come; the same
command resumes where it was interrupted.

Tasks: `digits` (scikit-learn's 1,797 images of 8 x 8, a small ViT), `co2` (statsmodels' weekly carbon dioxide at Mauna
Loa, a small PatchTST: 96 weeks give the next 24), and `images` with a ViT-S/16: any image data set of the hub, such as
ILSVRC/imagenet-1k, or a folder of class folders, given with --images. Requires: pip install scikit-learn statsmodels.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sbft.optim import SGD, Adafactor, AdamW
from sbft.tokens import half_life_from_beta

REFERENCE_BATCH = 64
REFERENCE_BETA2 = 0.95  # the paper's, at its reference batch
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Row:
    """One way to train."""

    optimizer: str
    batch: int
    second_moment: str
    """`half-life`: kept in examples; `decay`: the reference's factor per step; `none`: the optimizer has none."""
    rates: tuple[float, ...]

    @property
    def name(self) -> str:
        kept = {"half-life": "", "decay": f", beta2 {REFERENCE_BETA2} a step", "none": ""}
        return f"{self.optimizer}, batch {self.batch}{kept[self.second_moment]}"


def _grid(lowest: float) -> tuple[float, ...]:
    """Five half-decades."""
    return tuple(float(f"{lowest * 10 ** (i / 2):.2g}") for i in range(5))


ROWS = [
    Row("adam", REFERENCE_BATCH, "half-life", _grid(3e-4)),
    Row("adam", 1, "half-life", _grid(3e-5)),
    Row("adam", 1, "decay", _grid(3e-5)),
    Row("adafactor", REFERENCE_BATCH, "half-life", _grid(1e-2)),
    Row("adafactor", 1, "half-life", _grid(1e-3)),
    Row("adafactor", 1, "decay", _grid(1e-3)),
    Row("sgd", REFERENCE_BATCH, "none", _grid(3e-2)),
    Row("sgd", 1, "none", _grid(1e-3)),
]


@dataclass
class Part:
    """Examples: inputs of the model, and the expected answers."""

    inputs: Any
    targets: Any

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.inputs[rows], self.targets[rows]


@dataclass
class Task:
    """A model, three parts of its data, and how it is scored."""

    train: Part
    validation: Part
    test: Part
    model: Callable[[], nn.Module]
    forward: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    """Returns the loss of a batch, and the reported figure of each example."""
    figure: str
    epochs: int


def digits(arguments: argparse.Namespace) -> Task:
    from sklearn.datasets import load_digits
    from transformers import ViTConfig

    dataset = load_digits()
    order = torch.randperm(len(dataset.target), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(dataset.images, dtype=torch.float32) / 16 - 0.5).unsqueeze(1)[order]
    labels = torch.tensor(dataset.target, dtype=torch.int64)[order]
    bounds = (0, 1077, 1437, 1797)
    parts = [Part(images[a:b], labels[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256, num_labels=10,
    )  # fmt: skip
    return _classification(parts, config, epochs=10)


def images(arguments: argparse.Namespace) -> Task:
    from datasets import load_dataset
    from transformers import ViTConfig

    folder = Path(arguments.images)
    splits = load_dataset("imagefolder", data_dir=str(folder)) if folder.is_dir() else load_dataset(arguments.images)
    train = splits["train"]
    names = train.features["label"].names
    # The figures are measured on other data than the learning rate is chosen on.
    held_out = next((splits[name] for name in ("validation", "test") if name in splits), None)
    split = train.train_test_split(0.05, seed=0, stratify_by_column="label")
    parts = [_Images(split["train"]), _Images(split["test"])]
    if held_out is None:
        again = split["train"].train_test_split(0.05, seed=0, stratify_by_column="label")
        parts = [_Images(again["train"]), _Images(split["test"]), _Images(again["test"])]
    else:
        parts.append(_Images(held_out))
    config = ViTConfig(
        image_size=_Images.SIZE, patch_size=16, hidden_size=384, num_hidden_layers=12, num_attention_heads=6,
        intermediate_size=1536, num_labels=len(names),
    )  # fmt: skip
    return _classification(parts, config, epochs=arguments.epochs or 90)


class _Images(Part):
    """Pictures that are read when needed: scaled, cropped to the central square, with values from -1 to 1."""

    SIZE = 224

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset, dataset.with_format(None).select_columns("label"))

    def batch(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        examples = [self.inputs[row] for row in rows]
        labels = torch.tensor([example["label"] for example in examples])
        return torch.stack([self._tensor(example["image"]) for example in examples]), labels

    def _tensor(self, image: Any) -> Tensor:
        import numpy as np
        from PIL import ImageOps

        square = ImageOps.fit(image.convert("RGB"), (self.SIZE, self.SIZE))
        return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 127.5 - 1


def _classification(parts: list[Any], config: Any, epochs: int) -> Task:
    from transformers import ViTForImageClassification

    def forward(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(pixel_values=inputs).logits
        return nn.functional.cross_entropy(logits, labels), 100.0 * (logits.argmax(-1) != labels)

    return Task(*parts, lambda: ViTForImageClassification(config), forward, "error, %", epochs)


def co2(arguments: argparse.Namespace) -> Task:
    import statsmodels.datasets.co2
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    past, future = 96, 24
    weekly = statsmodels.datasets.co2.load_pandas().data["co2"].interpolate()
    series = torch.tensor(weekly.to_numpy(), dtype=torch.float32)
    # Split in time: no part contains what a later part forecasts.
    ends = [int(len(series) * share) for share in (0.7, 0.85, 1.0)]
    parts = []
    for begin, end in zip([past, *ends], ends, strict=False):
        windows = [series[i - past : i + future] for i in range(begin, end - future + 1)]
        stacked = torch.stack(windows).unsqueeze(-1)
        parts.append(Part(stacked[:, :past], stacked[:, past:]))
    config = PatchTSTConfig(
        num_input_channels=1, context_length=past, prediction_length=future, patch_length=8, patch_stride=8, d_model=64,
        num_hidden_layers=3, num_attention_heads=4, ffn_dim=128, dropout=0.0, head_dropout=0.0, attention_dropout=0.0,
        ff_dropout=0.0, path_dropout=0.0, positional_dropout=0.0, norm_type="layernorm", scaling="std", loss="mse",
    )  # fmt: skip

    def forward(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        forecast = model(past_values=inputs).prediction_outputs
        spread = inputs.std(dim=1, keepdim=True)
        square = ((forecast - targets) / spread).square().mean(dim=(1, 2))
        return square.mean(), square

    return Task(*parts, lambda: PatchTSTForPrediction(config), forward, "squared error", 10)


TASKS = {"digits": digits, "co2": co2, "images": images}


def optimizer_of(row: Row, model: nn.Module, rate: float, seed: int) -> Any:
    """The row's optimizer, with the row's rule for its second moment."""
    held: dict[str, Any] = {"second_moment_half_life": half_life_from_beta(REFERENCE_BETA2, REFERENCE_BATCH)}
    settings = {"half-life": held, "decay": {"beta2": REFERENCE_BETA2}, "none": {}}[row.second_moment]
    made = {"adam": functools.partial(AdamW, beta1=0.9), "adafactor": Adafactor, "sgd": SGD}[row.optimizer]
    return made(model.parameters(), lr=rate, seed=seed, **settings)


def batches(count: int, size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Yields the rows of each step; the rest of an epoch begins the next batch."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)]).tolist()
    for begin in range(0, len(order) - size + 1, size):
        yield order[begin : begin + size]


def measured(task: Task, model: nn.Module, part: Any) -> tuple[float, float]:
    """Mean loss and mean figure over a part."""
    model.eval()
    losses, figures = [], []
    with torch.no_grad():
        for begin in range(0, len(part), EVALUATION_BATCH):
            rows = list(range(begin, min(begin + EVALUATION_BATCH, len(part))))
            loss, figure = task.forward(model, *part.batch(rows))
            losses.append(float(loss) * len(rows))
            figures += figure.float().tolist()
    return math.fsum(losses) / len(part), statistics.fmean(figures)


def train(task_name: str, row: Row, rate: float, seed: int, part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Makes one run, measured on a part of the data."""
    torch.set_num_threads(1)
    task = TASKS[task_name](arguments)
    torch.manual_seed(seed)
    model = task.model()
    optimizer = optimizer_of(row, model, rate, seed)
    epochs = arguments.epochs or task.epochs
    steps = len(task.train) * epochs // row.batch
    warm_up = max(1, steps // 20)
    begun, error = time.perf_counter(), None
    model.train()
    with optimizer.release_gradients():
        for step, rows in enumerate(batches(len(task.train), row.batch, epochs, seed)):
            share = (step + 1) / warm_up if step < warm_up else _cosine((step - warm_up) / (steps - warm_up))
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.tokens_per_step = len(rows)
            loss, _ = task.forward(model, *task.train.batch(rows))
            if not torch.isfinite(loss):
                error = f"the loss is {float(loss)} in step {step + 1}"
                break
            loss.backward()
            optimizer.step()
    loss, figure = (None, None) if error else measured(task, model, getattr(task, part))
    if loss is not None and not math.isfinite(loss):
        loss, figure, error = None, None, "its loss is not finite"
    return {
        "task": task_name, **asdict(row), "name": row.name, "learning_rate": rate, "seed": seed, "part": part, "steps": steps,
        "epochs": epochs, "figure": task.figure, "value": figure, "loss": loss, "error": error,
        "seconds": time.perf_counter() - begun, "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
    }  # fmt: skip


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def key(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["task"], run["name"], run["learning_rate"], run["seed"], run["part"]


def make(requested: list[tuple[str, Row, float, int, str]], runs: dict[tuple[Any, ...], Any], arguments: Any) -> None:
    """Makes the runs that are missing; each is written to the file as it ends."""
    missing = [run for run in requested if (run[0], run[1].name, *run[2:]) not in runs]
    with ProcessPoolExecutor(arguments.jobs) as pool, (arguments.output / "runs.jsonl").open("a") as file:
        begun = [pool.submit(train, *run, arguments) for run in missing]
        for done in as_completed(begun):
            if done.exception() is not None:
                pool.shutdown(
                    wait=False, cancel_futures=True
                )  # otherwise all remaining runs would still be made, and their results lost
            run = done.result()
            runs[key(run)] = run
            file.write(json.dumps(run) + "\n")
            file.flush()
            value = run["error"] or f"{run['figure']} {run['value']:.4g}"
            print(f"{run['task']}, {run['name']}, rate {run['learning_rate']:g}, {run['part']}: {value}", flush=True)


def chosen_rate(task: str, row: Row, runs: dict[tuple[Any, ...], Any]) -> float:
    """The rate with the lowest validation loss, which on few examples says more than a count of errors."""
    tried = [runs[task, row.name, rate, 0, "validation"] for rate in row.rates]
    return float(min(tried, key=lambda run: math.inf if run["loss"] is None else run["loss"])["learning_rate"])


def table(tasks: list[str], runs: dict[tuple[Any, ...], Any], seeds: list[int]) -> str:
    lines = ["| task | optimizer | learning rate | test | test loss | s per run |", "|---|---|---|---|---|---|"]
    for task in tasks:
        for row in ROWS:
            rate = chosen_rate(task, row, runs)
            tests = [runs[task, row.name, rate, seed, "test"] for seed in seeds]
            edge = " (edge of its grid)" if rate in (row.rates[0], row.rates[-1]) else ""
            seconds = statistics.median(run["seconds"] for run in tests)
            figure = f"{tests[0]['figure']} {_mean(tests, 'value')}"
            lines.append(
                f"| {task} | {row.name} | {rate:g}{edge} | {figure} | {_mean(tests, 'loss')} | {seconds:.0f} |"
            )
    return "\n".join(lines)


def _mean(runs: list[dict[str, Any]], name: str) -> str:
    values = [run[name] for run in runs if run[name] is not None]
    if len(values) < len(runs):
        return f"{len(runs) - len(values)} of {len(runs)} seeds failed"
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["digits", "co2"])
    parser.add_argument("--images", help="for task images: a hub id, or a folder of class folders")
    parser.add_argument("--epochs", type=int, help="passes over the training data; by default each task's own number")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on one thread")
    parser.add_argument("--output", type=Path, required=True, help="folder of runs.jsonl and table.md")
    arguments = parser.parse_args()
    if "images" in arguments.tasks and not arguments.images:
        parser.error(
            "the task images requires --images: a hub id such as ILSVRC/imagenet-1k, or a folder of class folders"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    stored = arguments.output / "runs.jsonl"
    lines = stored.read_text().splitlines() if stored.is_file() else []
    runs = {key(run): run for run in map(json.loads, lines)}
    searched = [(task, row, rate, 0, "validation") for task in arguments.tasks for row in ROWS for rate in row.rates]
    make(searched, runs, arguments)
    tested = [
        (task, row, chosen_rate(task, row, runs), seed, "test")
        for task in arguments.tasks
        for row in ROWS
        for seed in arguments.seeds
    ]
    make(tested, runs, arguments)
    text = table(arguments.tasks, runs, arguments.seeds)
    (arguments.output / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
