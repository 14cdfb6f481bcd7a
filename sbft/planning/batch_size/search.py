"""The smallest batch at full throughput, found by training with several: the story of `sbft batch-size`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset

from sbft.data.format import FormatReport
from sbft.data.windows import TokenWindows
from sbft.errors import TrainingError
from sbft.native.memory import device_name, model_bytes
from sbft.native.sizes import gib
from sbft.planning.batch_size.curve import Curve, Timed, search
from sbft.planning.batch_size.peak_flops import peak_flops
from sbft.planning.batch_size.scaled_recipe import BatchSettings, batch_settings
from sbft.planning.batch_size.step_timing import StepTimer, longest_examples
from sbft.planning.memory.usable import usable_bytes
from sbft.recipe import Recipe, resolve
from sbft.runs.build import prepare_model
from sbft.runs.failures import training_advice
from sbft.runs.prepare import prepare
from sbft.runs.record import versions

FULL_THROUGHPUT = 0.95
Say = Callable[[str], None]


@dataclass(frozen=True)
class BatchSizes:
    """The batch sizes that ran, and the one to use."""

    recipe: Recipe
    """Resolved."""
    device: str
    share: float
    """Of the best throughput that counts as full."""
    limit_bytes: int | None
    """Peak memory that was not to be passed; None: until it ran out."""
    peak_flops: float | None
    """Operations per second that the device could do at most, where it is known."""
    curve: Curve
    settings: BatchSettings

    @property
    def chosen(self) -> Timed:
        """The smallest size at full throughput, which is one of those that ran."""
        return self.curve.smallest_at(self.share)

    def mfu(self, timed: Timed) -> float | None:
        """Model FLOPs utilization, a share of 1."""
        if timed.flops_per_step is None or self.peak_flops is None:
            return None
        return timed.flops_per_step / timed.step_s / self.peak_flops

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON: bytes, seconds, operations."""
        return {
            "schema": 1,
            "batch_size": self.chosen.batch_size,
            "overrides": self.settings.overrides,
            "notes": self.settings.notes,
            "share": self.share,
            "limit_bytes": self.limit_bytes,
            "timed": [
                {**asdict(one), "tokens_per_s": one.tokens_per_s, "mfu": self.mfu(one)} for one in self.curve.timed
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
    """Train with batch sizes 1, 2, 4, ... for a moment each, on the longest examples, and choose the smallest that suffices.

    The model is loaded once, its weights stay as they are, and nothing is saved.

    Args:
        recipe: as loaded; the method's defaults are filled in here.
        share: of the best throughput seen, above 0 and at most 1, that the chosen size must reach.
        largest: batch size that is not passed.
        limit_bytes: peak memory that is not to be passed; what is free here when None, and on CUDA all there is.
        seconds: for at least so long each size is timed.
        say: told in a sentence what begins now, and what a size came to.

    Raises:
        SbftError: if the recipe cannot be trained, or not even at batch size 1 within the memory.
    """
    recipe = resolve(recipe)
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
        found = "out of memory" if result is None else f"{result.tokens_per_s:,.0f} tokens/s"
        say(f"Batch size {batch_size}: {found}")
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
    """Of what a batch counts: rows, where examples are packed into them."""
    return report.tokens / (report.packed_into or report.examples)


def _nothing_ran(recipe: Recipe, curve: Curve, weights_bytes: int, limit_bytes: int | None) -> str:
    needed = curve.ending.needed_bytes
    if needed is not None and limit_bytes is not None:
        return (
            f"Batch size 1 takes {gib(needed)}, more than the {gib(limit_bytes)} that it may take. "
            "Raise --memory-limit, or add --set data.max_length=N for shorter examples."
        )
    return f"Batch size 1 does not fit. {training_advice(recipe, {'weights': weights_bytes}, None, 1).text}"
