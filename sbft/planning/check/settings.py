"""Signs that a run will go wrong: its settings of optimizer, rounding, batch, learning rate and warm-up."""

from __future__ import annotations

from transformers.trainer_utils import SchedulerType

from sbft.grid.formats import NAMED
from sbft.planning.check.finding import Finding
from sbft.planning.check.grid_noise import spacing
from sbft.planning.check.length import run_length, tokens_per_row, tokens_per_step
from sbft.recipe.methods import METHODS
from sbft.runs.prepare import Prepared
from sbft.tokens import FINE_TUNING_HALF_LIFE, beta_from_half_life, half_life_from_beta

HALF_LIFE = int(round(FINE_TUNING_HALF_LIFE, -3))
# A second moment is too short if it spans too few tokens and too few examples. The limits are a tenth of fine-tuning's
# default half-life, and about half of the 216 examples of the usual 0.95 at batch 16. So 0.999 passes, even with short
# examples.
SHORT_HALF_LIFE = HALF_LIFE / 10
FEW_EXAMPLES = 100
# Beyond this, quality falls: at 3e-3 the quickstart's task got 67 % right, at 1e-3 86 % (benchmarks/README.md).
HIGHEST_RELATIVE_STEP = 1e-3
# Tokens at which computing takes as long as reading the weights. On GPUs this is the ratio of bfloat16 operations to bytes
# per second: 156 on an A100, 295 on an H100. On two cores of a Xeon, a token takes 1.3 times as long at 64 as at 512.
COMPUTE_BOUND_TOKENS = {"cpu": 64}
COMPUTE_BOUND_GPU_TOKENS = 300
FAR_UNDER = 1 / 4
FAR_LONGER = 10
# Schedules of transformers that ignore a warm-up.
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")


def short_second_moment(prepared: Prepared) -> Finding | None:
    """A decay per step that was chosen for large batches."""
    beta2, schedule = prepared.recipe.optimizer.beta2, prepared.recipe.optimizer.schedule
    if beta2 is None or schedule == "power":  # where beta2 is the exponent
        return None
    tokens = tokens_per_step(prepared)
    half_life = half_life_from_beta(beta2, tokens) if beta2 > 0 else 0.0
    examples = half_life * prepared.report.examples / prepared.report.tokens
    if half_life >= SHORT_HALF_LIFE or examples >= FEW_EXAMPLES:
        return None
    if "second_moment_half_life" in METHODS[prepared.recipe.method].settings:
        fix = f"--set optimizer.beta2=null --set optimizer.second_moment_half_life={HALF_LIFE}"
    else:
        fix = f"--set optimizer.beta2={beta_from_half_life(HALF_LIFE, tokens):.6g}"
    return Finding(
        "beta2-not-scaled",
        "warning",
        f"optimizer.beta2 {beta2:g} is not scaled to the batch",
        f"It forgets half of the squared gradients within {half_life:,.0f} tokens ({examples:.2g} examples of this "
        "data), so every step is divided by noise. Small batches train as well as large ones when the second "
        f"moment's half-life stays the same in tokens. For fine-tuning, {HALF_LIFE:,} works well (arXiv 2507.07101, "
        "section 3.2).",
        fix,
    )


def rounded_to_nearest(prepared: Prepared) -> Finding | None:
    """Weights in bfloat16 or on a grid without stochastic rounding. Adapters are float32, so they need none."""
    recipe = prepared.recipe
    method = METHODS[recipe.method]
    if recipe.grids is not None and not recipe.optimizer.stochastic_rounding:
        return _rounded_to_nearest_on_a_grid(prepared, recipe.grids)
    if recipe.dtype != "bfloat16" or recipe.lora is not None or recipe.optimizer.stochastic_rounding:
        return None
    can_round = "stochastic_rounding" in method.settings
    return Finding(
        "no-stochastic-rounding",
        "warning",
        "bfloat16 weights without stochastic rounding",
        "An update of less than 1/512 of a weight is always lost when the result is rounded to the nearest bfloat16, "
        f"and most updates of fine-tuning are smaller.{'' if can_round else _defined_so(recipe.method)}",
        "--set optimizer.stochastic_rounding=true" if can_round else "--method sbft",
    )


def _rounded_to_nearest_on_a_grid(prepared: Prepared, formats: str | dict[str, str]) -> Finding:
    names = formats.values() if isinstance(formats, dict) else [formats]
    on_grids = [NAMED[name] for name in names if name in NAMED]
    step, name = max((spacing(grid, grid.block), grid.name) for grid in on_grids)
    rate = prepared.arguments.learning_rate
    absolute = not prepared.recipe.optimizer.relative_step
    return Finding(
        "no-stochastic-rounding",
        "error" if absolute or rate < step / 2 else "warning",
        f"Weights in {name} without stochastic rounding",
        "Rounding to nearest loses every update smaller than half the spacing of the grid. In "
        f"{name} that is about {step / 2:.1g} of a weight matrix's RMS{'' if absolute else f', and a step is {rate:g} of it'}. "
        "A model in 8 bits did not learn this way: 47 % of its answers were right before and after training. With "
        "stochastic rounding it was 91 %.",
        "--set optimizer.stochastic_rounding=true",
    )


def needless_accumulation(prepared: Prepared) -> Finding | None:
    """Gradient accumulation where there is nothing to communicate."""
    recipe, arguments = prepared.recipe, prepared.arguments
    steps = arguments.gradient_accumulation_steps
    if steps <= 1 or arguments.world_size > 1:
        return None
    by_definition = METHODS[recipe.method].training_defaults.get("gradient_accumulation_steps") == steps
    fix = "--set training.gradient_accumulation_steps=1"
    if recipe.method == "adam-accum":
        fix = "--method adam"
    elif "second_moment_half_life" in METHODS[recipe.method].settings and recipe.optimizer.beta2 is not None:
        fix += f" --set optimizer.beta2=null --set optimizer.second_moment_half_life={HALF_LIFE}"
    return Finding(
        "accumulation-on-one-device",
        "warning",
        f"Gradients are accumulated over {steps} batches on one device",
        "All gradients stay in memory meanwhile, nothing is computed faster, and there are fewer updates. Small batches "
        "train as well once the half-life counts tokens (arXiv 2507.07101). Accumulation pays only where devices wait for "
        f"one another.{_defined_so(recipe.method) if by_definition else ''}",
        fix,
    )


def far_under_compute_bound(prepared: Prepared) -> Finding | None:
    """So few tokens in a forward pass that the device waits for its memory."""
    device = prepared.arguments.device.type
    bound = COMPUTE_BOUND_TOKENS.get(device, COMPUTE_BOUND_GPU_TOKENS)
    tokens = tokens_per_row(prepared) * min(prepared.arguments.per_device_train_batch_size, len(prepared.examples))
    if tokens >= FAR_UNDER * bound:
        return None
    return Finding(
        "far-under-compute-bound",
        "note",
        f"A forward pass has only about {tokens:.0f} tokens",
        f"This device needs roughly {bound} to be busy. With fewer, it waits for the weights to be read, and more tokens "
        "per step would hardly take longer. This costs time, not quality. sbft batch-size RECIPE measures which batch "
        "size pays.",
    )


def unused_graphs(prepared: Prepared) -> Finding | None:
    """CUDA graphs that the recipe asks for and that cannot be used."""
    if not prepared.recipe.optimizer.cuda_graphs:
        return None
    if prepared.arguments.device.type != "cuda":
        return Finding(
            "graphs-not-used",
            "note",
            "optimizer.cuda_graphs does nothing on this machine",
            "Steps are launched as graphs on a CUDA device, and there is none here. The run is the same without it.",
        )
    if prepared.pretrains or not prepared.recipe.data.packing:
        return None
    return Finding(
        "graphs-not-used",
        "warning",
        "optimizer.cuda_graphs does nothing with packed examples",
        "A graph supports tokens, labels and padding on the right. Packed rows have positions as well, so their steps are "
        "still launched kernel by kernel.",
        "--set optimizer.cuda_graphs=false",
    )


def large_relative_step(prepared: Prepared) -> Finding | None:
    """A learning rate that is too high where steps are relative to each weight's size."""
    recipe = prepared.recipe
    if prepared.pretrains:  # new weights have far to travel, and no run has shown what is too high
        return None
    method = METHODS[recipe.method]
    rate = prepared.arguments.learning_rate
    if (
        method.optimizer not in ("adafactor", "row_adafactor")
        or not recipe.optimizer.relative_step
        or rate <= HIGHEST_RELATIVE_STEP
    ):
        return None
    return Finding(
        "relative-step-too-large",
        "warning",
        f"An Adafactor relative step of {rate:g} is over {HIGHEST_RELATIVE_STEP:g}",
        f"The learning rate is relative to each weight matrix: every step may change it by {rate:.2g} of its size. In the "
        "quickstart's 200 steps of one example, 3e-3 reached 67 % right answers and 1e-3 reached 86 %.",
        f"--set training.learning_rate={method.learning_rate:g}",
    )


def warmup(prepared: Prepared) -> Finding | None:
    """A warm-up that is as long as the run, or that its schedule ignores."""
    arguments, steps = prepared.arguments, run_length(prepared).steps
    warm = arguments.get_warmup_steps(steps)
    if warm == 0:
        return None
    kind = str(SchedulerType(arguments.lr_scheduler_type).value)
    if kind in _WITHOUT_WARMUP:
        return Finding(
            "warmup-without-effect",
            "warning",
            f"A warm-up of {warm} steps has no effect",
            f"training.lr_scheduler_type is {kind}, which has no warm-up: the first step uses the full rate.",
            "--set training.lr_scheduler_type=constant_with_warmup",
        )
    if warm < steps:
        return None
    return Finding(
        "warmup-longer-than-run",
        "warning",
        f"The warm-up of {warm} steps is longer than the run, which has {steps}",
        f"The learning rate never reaches {arguments.learning_rate:g}; most steps use a fraction of it.",
        f"--set training.warmup_steps={steps // 10}",
    )


def long_half_life(prepared: Prepared) -> Finding | None:
    """A second moment whose half-life is far longer than the run, so that it forgets nothing."""
    half_life = prepared.recipe.optimizer.second_moment_half_life
    length = run_length(prepared)
    if half_life is None or half_life < FAR_LONGER * length.tokens:
        return None
    return Finding(
        "half-life-longer-than-run",
        "note",
        f"The half-life of {half_life:,.0f} tokens is far longer than the run ({length.tokens:,})",
        "Harmless: with bias correction, the average is then the plain mean of all squared gradients seen so far.",
    )


def _defined_so(method: str) -> str:
    return f" Method {method} is defined this way: it exists for comparison."


SETTINGS_CHECKS = (
    short_second_moment,
    rounded_to_nearest,
    needless_accumulation,
    far_under_compute_bound,
    unused_graphs,
    large_relative_step,
    warmup,
    long_half_life,
)
