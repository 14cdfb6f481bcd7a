"""The model card of a run: what it was trained from, how, and what was measured."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from sbft.errors import without_secrets
from sbft.models.names import BUILTIN
from sbft.models.scratch import is_scratch
from sbft.native.sizes import gib
from sbft.recipe.methods import METHODS
from sbft.runs.record import RunRecord

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(record: RunRecord, folder: Path) -> Path:
    """Write `README.md`, with the metadata that model hubs read, into the folder of a run.

    Args:
        record: the record of a run with status `ok`.
        folder: where its model is.
    """
    path = folder / "README.md"
    path.write_text(without_secrets(card(record)), encoding="utf-8")
    return path


def card(record: RunRecord) -> str:
    """The text of the model card."""
    adapter = METHODS[record.method].lora_defaults is not None
    about = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["sbft", record.method])),
    }
    if base := _hub_id(record.model):
        about["base_model"] = base
    recipe = yaml.safe_dump(record.recipe, sort_keys=False, width=100).rstrip()
    return f"""---
{yaml.safe_dump(about, sort_keys=False).rstrip()}
---

# {record.model}, {"pretrained" if is_scratch(record.model) else "fine-tuned"} on {record.dataset}

{"A LoRA adapter" if adapter else "A model"} trained with sbft, method `{record.method}`.
{METHODS[record.method].summary}

{_metrics_table(record)}

{_figures_table(record)}

## Recipe

Save it as `recipe.yaml` and type `sbft train recipe.yaml` to repeat the run.

```yaml
{recipe}
```

Versions: {", ".join(f"{name} {number}" for name, number in record.versions.items())}.
"""


def _hub_id(model: str) -> str | None:
    if model.startswith("builtin:"):
        return BUILTIN[model.removeprefix("builtin:")].hub_id
    return model if _HUB_ID.fullmatch(model) and not Path(model).exists() else None


def _metrics_table(record: RunRecord) -> str:
    if not record.metrics and not record.watched:
        return "It was not evaluated."
    examples = record.data.get("evaluation_examples")
    tables = [_before_and_after(f"{record.evaluated_on}, {examples} examples", record.metrics_before, record.metrics)]
    for name, figures in record.watched.items():
        title = f"{name} (other data, to see what is forgotten), {figures['examples']} examples"
        tables.append(_before_and_after(title, figures.get("metrics_before", {}), figures.get("metrics", {})))
    return "\n\n".join(table for table in tables if table)


def _before_and_after(title: str, before: dict[str, float], after: dict[str, float]) -> str:
    if not after:
        return ""
    rows = [f"| {name} | {_number(before.get(name))} | {_number(value)} |" for name, value in after.items()]
    return "\n".join([f"| {title} | before | after |", "| --- | --- | --- |", *rows])


def _figures_table(record: RunRecord) -> str:
    rows = {
        "parameters trained": f"{record.trainable_parameters:,} of {record.parameters:,}",
        "steps": f"{record.steps:,}",
        "tokens": f"{record.tokens:,}",
        f"peak memory of training ({record.memory_kind})": _gib(record.peak_memory_bytes),
        "part of it above the loaded model": _gib(record.memory.get("above_baseline")),
        "tokens per second": _number(record.tokens_per_s),
        "training time": f"{record.train_s or 0:.0f} s",
        "device": record.device,
    }
    return "\n".join(["| measured | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _gib(size: int | None) -> str:
    return "" if size is None else gib(size)
