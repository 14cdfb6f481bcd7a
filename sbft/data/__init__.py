"""From a hub id, a file or a generated task to token ids and labels."""

from sbft.data.collate import Collator
from sbft.data.format import FormatReport, encode_prompts, format_dataset
from sbft.data.sources import Splits, load_source, load_splits

__all__ = ["Collator", "FormatReport", "Splits", "encode_prompts", "format_dataset", "load_source", "load_splits"]
