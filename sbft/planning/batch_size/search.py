"""Find the smallest batch size at full throughput by training with several: what `sbft batch-size` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset

from sbft.data.format import FormatReport
from sbft.data.windows import TokenWindows
from sbft.errors import TrainingError
from sbft.models.load import check_model
from sbft.native.memory import device_name, model_bytes
from sbft.native.sizes import gib
from sbft.planning.batch_size.curve import Curve, Timed, search
from sbft.planning.batch_size.peak_flops import peak_flops
from sbft.planning.batch_size.scaled_recipe import BatchSettings, batch_settings
from sbft.planning.batch_size.step_timing import StepTimer, longest_examples
from sbft.planning.memory.usable import usable_bytes
from sbft.recipe import Recipe
from sbft.runs.build import prepare_model
from sbft.runs.failures import training_advice
from sbft.runs.prepare import prepare
from sbft.runs.record import versions

FULL_THROUGHPUT = 0.95
Say = Callable[[str], None]


@dataclass(frozen=True)
class BatchSizes:
    """The batch sizes that ran, and which one to use."""

    recipe: Recipe
    """Resolved."""
    device: str
    share: float
    """The share of the best throughput that counts as full."""
    limit_bytes: int | None
    """Limit of the peak memory; None where sizes were tried until memory ran out."""
    peak_flops: float | None
    """Peak operations per second of the device, where known."""
    curve: Curve
    settings: BatchSettings

    @property
    def recommended(self) -> Timed:
        """The smallest size at full throughput."""
        return self.curve.smallest_at(self.share)

    def mfu(self, timed: Timed) -> float | None:
        """Model FLOPs utilization, between 0 and 1; None where it is unknown."""
        if timed.flops_per_step is None or self.peak_flops is None:
            return None
        return timed.flops_per_step / timed.step_s / self.peak_flops

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, in bytes, seconds and operations."""
        return {
            "schema": 1,
            "batch_size": self.recommended.batch_size,
            "overrides": self.settings.overrides,
            "notes": self.settings.notes,
            "share": self.share,
            "limit_bytes": self.limit_bytes,
            "timed": [
                {**asdict(timed), "tokens_per_s": timed.tokens_per_s, "mfu": self.mfu(timed)}
                for timed in self.curve.timed
            ],
            "ending": asdict(self.curve.ending),
            "device": self.device,
            "peak_flops": self.peak_flops,
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "versions": versions(),
        }


def find_batch_size(
    recipe: Recipe,
    *,
    share: float = FULL_THROUGHPUT,
    largest: int | None = None,
    limit_bytes: int | None = None,
    seconds: float = 2.0,
    say: Say = lambda line: None,
) -> BatchSizes:
    """Train briefly with batch sizes 1, 2, 4, ... on the longest examples, to find the smallest at full throughput.

    The model is loaded once, its weights do not change, and nothing is saved.

    Args:
        recipe: as `sbft.recipe.resolve` returns it.
        share: of the best throughput, above 0 and at most 1, that counts as full.
        largest: largest batch size to try.
        limit_bytes: limit of the peak memory. When None, the free memory of this machine, or all memory of a CUDA device.
        seconds: minimum time to measure each size.
        say: called with a sentence about what starts next, and about each size's result.

    Raises:
        SbftError: if the recipe cannot be trained, or batch size 1 does not fit into memory.
    """
    check_model(recipe.model)
    say(f"Reading {recipe.data.train}")
    prepared = prepare(recipe)
    if isinstance(prepared.examples, TokenWindows):
        examples = Dataset.from_list(prepared.examples.first(64))
    else:
        examples = longest_examples(prepared.examples)
    say(f"Loading {recipe.model}")
    limit = usable_bytes(prepared.arguments.device) if limit_bytes is None else limit_bytes
    model = prepare_model(recipe, prepared.tokenizer)
    timer = StepTimer(recipe, model, examples, prepared.tokenizer.pad_token_id, seconds)

    def run(batch_size: int) -> Timed | None:
        result = timer(batch_size)
        outcome = "out of memory" if result is None else f"{result.tokens_per_s:,.0f} tokens/s"
        say(f"Batch size {batch_size}: {outcome}")
        return result

    say(f"Timing steps on the longest examples, {timer.tokens_per_example:.0f} tokens each")
    curve = search(run, share=share, largest=largest, limit_bytes=limit)
    if not curve.timed:
        raise TrainingError(_nothing_ran(recipe, curve, model_bytes(model), limit))
    device = device_name(prepared.arguments.device)
    return BatchSizes(
        recipe=recipe,
        device=device,
        share=share,
        limit_bytes=limit,
        peak_flops=peak_flops(device, str(recipe.dtype), tf32=bool(recipe.training.get("tf32"))),
        curve=curve,
        settings=batch_settings(recipe, curve.smallest_at(share).batch_size, _tokens_per_example(prepared.report)),
    )


def _tokens_per_example(report: FormatReport) -> float:
    """Mean tokens of what a batch consists of: examples, or the rows they are packed into."""
    return report.tokens / (report.packed_into or report.examples)


def _nothing_ran(recipe: Recipe, curve: Curve, weights_bytes: int, limit_bytes: int | None) -> str:
    needed = curve.ending.needed_bytes
    if needed is not None and limit_bytes is not None:
        return (
            f"Batch size 1 takes {gib(needed)}, more than the limit of {gib(limit_bytes)}. "
            "Raise --memory-limit, or add --set data.max_length=N for shorter examples."
        )
    return f"Batch size 1 does not fit. {training_advice(recipe, {'weights': weights_bytes}, None, 1).text}"
