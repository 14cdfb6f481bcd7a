"""Measures and reports how much of its full model an extracted adapter keeps."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from sbft.data.sources import read_splits
from sbft.export.checkpoint import recipe_of, torch_dtype
from sbft.export.low_rank import Extraction
from sbft.models.load import load_model, load_tokenizer
from sbft.models.names import BUILTIN
from sbft.native.sizes import MIB, mib
from sbft.runs.measurement import measure
from sbft.runs.prepare import evaluation_rows
from sbft.runs.record import FILE_NAME, RunRecord, versions

REPORT_FILE = "export.json"
SCHEMA = 1


@dataclass(frozen=True)
class Metrics:
    """Metrics by a run's evaluation: of its base model, of the trained model, and of the extracted adapter."""

    adapter: dict[str, float] = field(default_factory=dict)
    full: dict[str, float] = field(default_factory=dict)
    base: dict[str, float] = field(default_factory=dict)
    examples: int | None = None
    why_not: str | None = None
    """A clause that says why the adapter was not measured."""


def measure_adapter(made: Extraction, source: Path, *, trust_remote_code: bool = False) -> Metrics:
    """Evaluate an adapter as the run was evaluated; the full model's metrics come from the run's record.

    Args:
        made: the adapter.
        source: the folder it was extracted from.
        trust_remote_code: run the Python code that comes with the model.

    Raises:
        SbftError: if the run's evaluation data cannot be read.
    """
    recipe = recipe_of(source)
    if recipe is None:
        return Metrics(why_not=f"{source} has no recipe.yaml, which names the evaluation data")
    rows = evaluation_rows(read_splits(recipe.data))
    if rows is None:
        return Metrics(why_not="the run's recipe has no evaluation data")
    model = load_model(str(made.folder), dtype=torch_dtype(str(recipe.dtype)), trust_remote_code=trust_remote_code)
    if torch.accelerator.is_available():
        # transformers types `to` by its wrapper, which takes no device.
        torch.nn.Module.to(model, torch.accelerator.current_accelerator())
    tokenizer = load_tokenizer(str(source), trust_remote_code=trust_remote_code)
    adapter = measure(recipe, model, tokenizer, rows)
    examples = min(len(rows), recipe.evaluation.limit or len(rows))
    # The record's metrics are those of the final weights, not of a checkpoint.
    record = RunRecord.load(source) if (source / FILE_NAME).is_file() else None
    if record is None:
        return Metrics(adapter, examples=examples)
    return Metrics(adapter, record.metrics, record.metrics_before, examples)


def save_report(made: Extraction, source: Path, metrics: Metrics | None) -> Path:
    """Write `export.json` and a model card into the adapter's folder; returns the former.

    Args:
        made: the adapter.
        source: the folder it was extracted from.
        metrics: of the adapter; None if not requested.
    """
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "source": str(source),
        "base": made.base,
        "rank": made.rank,
        "difference_squared_norm": made.difference,
        "share_kept": made.share_kept,
        "kinds": {
            kind.name: {
                "tensors": kind.tensors,
                "adapted": kind.adapted,
                "share_of_difference": kind.difference / made.difference,
                "share_kept": kind.kept / kind.difference,
            }
            for kind in made.kinds
        },
        "adapter_bytes": made.adapter_bytes,
        "model_bytes": made.model_bytes,
        "extract_s": made.extract_s,
        "metrics": metrics.adapter if metrics else {},
        "metrics_full": metrics.full if metrics else {},
        "metrics_base": metrics.base if metrics else {},
        "evaluation_examples": metrics.examples if metrics else None,
        "versions": versions(),
    }
    path = made.folder / REPORT_FILE
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (made.folder / "README.md").write_text(_card(made, metrics), encoding="utf-8")
    return path


def _card(made: Extraction, metrics: Metrics | None) -> str:
    """A model card with the metadata that hubs read."""
    about: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "sbft"]}
    if (name := made.base.removeprefix("builtin:")) in BUILTIN:
        about["base_model"] = BUILTIN[name].hub_id
    elif not Path(made.base).exists():
        about["base_model"] = made.base
    return f"""---
{yaml.safe_dump(about, sort_keys=False).rstrip()}
---

# A LoRA adapter of rank {made.rank} for {made.base}

It was not trained as an adapter. All weights were trained, and this is the best approximation of their difference to the
base model by matrices of this rank.

```
{tell(made, metrics)}
```
"""


def tell(made: Extraction, metrics: Metrics | None) -> str:
    """The report for people, at most 80 columns wide."""
    rows: list[tuple[str, ...]] = [("", "tensors", "of the difference", "kept")]
    for kind in sorted(made.kinds, key=lambda kind: -kind.difference):
        kept = _percent(kind.kept / kind.difference) if kind.adapted else "not in the adapter"
        rows.append((kind.name, str(kind.tensors), _percent(kind.difference / made.difference), kept))
    tensors = sum(kind.tensors for kind in made.kinds)
    rows.append(("all", str(tensors), "100 %", _percent(made.share_kept)))
    lines = [_aligned(rows)]
    size = f"{_mib(made.adapter_bytes)}, {_percent(made.adapter_bytes / made.model_bytes)} of the model's"
    lines.append(f"Rank {made.rank}: {size} {_mib(made.model_bytes)}.")
    if metrics is not None and metrics.adapter:
        lines.append(_aligned(_of_metrics(metrics)))
    elif metrics is not None:
        lines.append(f"Not measured: {metrics.why_not}.")
    return "\n\n".join(lines)


def _of_metrics(metrics: Metrics) -> list[tuple[str, ...]]:
    columns = {"base model": metrics.base, "full model": metrics.full, "adapter": metrics.adapter}
    known = {heading: values for heading, values in columns.items() if values}
    rows: list[tuple[str, ...]] = [(f"{metrics.examples} examples", *known)]
    for name in metrics.adapter:
        figures = (values.get(name) for values in known.values())
        rows.append((name, *("" if figure is None else f"{figure:.4g}" for figure in figures)))
    return rows


def _aligned(rows: list[tuple[str, ...]]) -> str:
    """Align columns, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _mib(size_bytes: int) -> str:
    return mib(size_bytes, 0 if size_bytes >= 10 * MIB else 1)
