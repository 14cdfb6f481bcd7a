"""Loads models and data sets of TRL's tests from a folder filled by `tiny_hub`, in place of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

OWNER = "trl-internal-testing/"
_AUTO_MODELS = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForImageTextToText")


def use(hub: Path) -> None:
    """From now on, look up names of `OWNER` in `hub` first."""
    _load_data_from(hub)
    classes: list[Any] = [
        transformers.AutoConfig,
        transformers.AutoTokenizer,
        transformers.AutoProcessor,
        transformers.GenerationConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        _BaseAutoModelClass,
    ]
    classes += [getattr(transformers, name) for name in _AUTO_MODELS]
    for cls in classes:
        if "from_pretrained" in vars(cls):
            _load_from(hub, cls)


def _load_from(hub: Path, cls: Any) -> None:
    theirs = cls.from_pretrained.__func__

    def from_pretrained(self: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        return theirs(self, _local(hub, name), *args, **kwargs)

    cls.from_pretrained = classmethod(from_pretrained)


def _local(hub: Path, name: Any) -> Any:
    if isinstance(name, str) and name.startswith(OWNER):
        folder = hub / name.removeprefix(OWNER)
        return str(folder) if folder.is_dir() else name
    return name


def _load_data_from(hub: Path) -> None:
    theirs = datasets.load_dataset

    def load_dataset(
        path: str, name: str | None = None, *args: Any, split: str | None = None, streaming: bool = False, **kwargs: Any
    ) -> Any:
        folder = hub / "data" / path.removeprefix(OWNER) / (name or "default")
        if not path.startswith(OWNER) or not folder.is_dir():
            return theirs(path, name, *args, split=split, streaming=streaming, **kwargs)
        parts: Any = datasets.load_from_disk(str(folder))
        if not streaming:
            return parts if split is None else parts[split]
        streamed = {part: rows.to_iterable_dataset() for part, rows in parts.items()}
        return datasets.IterableDatasetDict(streamed) if split is None else streamed[split]

    datasets.load_dataset = load_dataset
