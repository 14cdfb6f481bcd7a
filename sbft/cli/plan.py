"""`sbft plan`: how much memory each method would need, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbft.cli.shared import completion
from sbft.cli.shared.options import SetOption, TrustRemoteCodeOption, WeightsOption
from sbft.cli.shared.starting import loading_libraries
from sbft.cli.shared.verb import verb
from sbft.errors import RecipeError
from sbft.models.random_weights import ARCHITECTURES
from sbft.native.sizes import GIB, parse_bytes
from sbft.recipe.methods import METHODS
from sbft.recipe.settings import OPTIMIZERS

if TYPE_CHECKING:
    from sbft.planning.memory.fit import Plan, Row
    from sbft.planning.memory.offload import Speeds

_HEADINGS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer_state": "state",
    "activations": "activ",
    "logits": "logit",
    "workspace": "work",
    "runtime": "run",
}


@verb
def plan(
    model: Annotated[
        str,
        typer.Option(
            help=f"Hub id, local folder, builtin:NAME, or random:NAME for a known shape: {', '.join(ARCHITECTURES)}."
        ),
    ],
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of the GPU: 24GiB. Default: that of this machine."),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory of the GPU's host, for --offload: 64GiB. Default: that of this machine."
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What the host's link to the GPU moves per second in one direction. Default: measured, or 25GB without a GPU.",
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="TFLOP/s of the GPU in large bfloat16 products. Default: measured, or 100 without a GPU."
        ),
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of the longest example.")] = 1024,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Examples per forward pass; default: each method's own.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            autocompletion=completion.lists_of_methods,
            help=f"Any of {', '.join(METHODS)}. Default: all whose packages are installed.",
        ),
    ] = None,
    weights: WeightsOption = None,
    overrides: SetOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with sizes in bytes.")] = False,
) -> None:
    """Predict each method's peak memory, and what fits.

    Only the model's config is read: no weights are needed. The prediction assumes that every token is learned.
    """
    with loading_libraries():
        from rich.console import Console

        from sbft.native.memory import available_bytes, type_of
        from sbft.planning.memory.fit import make_plan
    planned, left_out = _methods_to_plan(methods, weights)
    device = "cuda" if gpu_memory is not None else type_of()
    speeds = _speeds(link, tflops, here=gpu_memory is None and device == "cuda")
    memory = available_bytes() if gpu_memory is None else parse_bytes(gpu_memory, "--gpu-memory")
    with Console(stderr=True).status("Planning") as status:
        made = make_plan(
            model,
            sequence_length=sequence_length,
            memory_bytes=memory,
            device=device,
            host_bytes=None if host_memory is None else parse_bytes(host_memory, "--host-memory"),
            methods=planned,
            batch_size=batch_size,
            weights=weights,
            overrides=overrides or (),
            trust_remote_code=trust_remote_code,
            say=lambda method: status.update(f"Planning {method}"),
        )
    if as_json:
        import json

        print(json.dumps(_for_machines(made, speeds), indent=1))
    else:
        _print_for_people(made, speeds)
    if left_out:
        Console(stderr=True, highlight=False).print(left_out, markup=False, soft_wrap=True)


def _speeds(link: str | None, tflops: float | None, *, here: bool) -> Speeds:
    """The speeds that the flags give; where one gives none, that of this machine's GPU if it is planned for, or the usual."""
    from sbft.planning.memory.offload import USUAL_SPEEDS, Speeds, measured_speeds

    speeds = measured_speeds() if here and None in (link, tflops) else USUAL_SPEEDS
    return Speeds(
        speeds.link_bytes_per_s if link is None else parse_bytes(link, "--link"),
        speeds.flops if tflops is None else tflops * 1e12,
    )


def _methods_to_plan(methods: str | None, weights: str | None) -> tuple[list[str], str | None]:
    """The methods to plan, and a line on those left out.

    If none was named, it is those whose packages are installed; with `weights`, those of them that have no format of their own
    and compute in bfloat16 with an optimizer of sbft's.
    """
    from sbft.recipe.wording import nearest

    if methods is None and weights is not None:
        return [
            name
            for name, method in METHODS.items()
            if method.weights is None and method.dtype == "bfloat16" and method.optimizer in OPTIMIZERS
        ], None
    if methods is None:
        usable = [name for name, method in METHODS.items() if not method.missing_packages]
        left_out = [name for name in METHODS if name not in usable]
        packages = sorted({package for name in left_out for package in METHODS[name].missing_packages})
        line = f"Left out, because a package is missing ({', '.join(packages)}): {', '.join(left_out)}."
        return usable, line if left_out else None
    names = [name.strip() for name in methods.split(",") if name.strip()]
    for name in names:
        if name not in METHODS:
            raise RecipeError(
                f"--methods names {name!r}, expected some of {', '.join(METHODS)}{nearest(name, METHODS)}."
            )
    if not names:
        raise RecipeError(f"--methods is empty, expected some of {', '.join(METHODS)}.")
    return names, None


def _print_for_people(plan: Plan, speeds: Speeds) -> None:
    from rich.console import Console
    from rich.table import Table

    from sbft.planning.memory.offload import HOST_MARGIN_BYTES

    console = Console(highlight=False)
    for row in plan.rows:
        if row.verdict == "host" and row.prediction is not None and row.prediction.streaming is not None:
            console.print(
                f"The host's memory is the limit: with --offload, {row.method} requires "
                f"{_gib(row.prediction.streaming.host_bytes + HOST_MARGIN_BYTES)} GiB of it, and there are "
                f"{_gib(plan.host_bytes)} GiB. Name another machine's with --host-memory.",
                markup=False,
                soft_wrap=True,
            )
    where = "GPU" if plan.device == "cuda" else "CPU"
    console.print(
        f"{plan.model}, sequences of {plan.sequence_length} tokens, {where} with {_gib(plan.memory_bytes)} GiB. "
        "Sizes in GiB, at the peak:",
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True, min_width=max(len(_label(row)) for row in plan.rows))
    for heading in (*_HEADINGS.values(), "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    table.add_column("longest", justify="right", no_wrap=True)
    for row in plan.rows:
        name = _label(row)
        if row.prediction is None:
            table.add_row(name, *[""] * (len(_HEADINGS) + 1), "?", "")
            continue
        needed = row.prediction.needed_bytes
        parts = [_gib(row.prediction.parts[part]) for part in _HEADINGS]
        table.add_row(name, *parts, _gib(needed), row.verdict, "-" if row.longest is None else str(row.longest))
    console.print(table)
    for problem in dict.fromkeys(row.problem for row in plan.rows if row.problem is not None):
        console.print(f"\nNot predicted: {problem}", markup=False, soft_wrap=True)
    if plan.note is not None:
        console.print(f"\n{plan.note}", markup=False, soft_wrap=True)
    console.print(
        "\n+c: with gradient checkpointing, which recomputes activations in backward. run: what the process itself needs, "
        "beside tensors. longest: tokens of the longest sequence that fits.",
        markup=False,
        soft_wrap=True,
    )
    _print_streaming(console, plan, speeds)
    lines = [row.command for row in _to_type(plan)]
    if lines:
        console.print("\nCommands that fit:", *(f"  {line}" for line in lines), sep="\n", markup=False, soft_wrap=True)
    else:
        console.print("\nNothing fits at this length.", markup=False)


def _print_streaming(console: Any, plan: Plan, speeds: Speeds) -> None:
    """What streaming layers takes beside the device's memory."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("method", no_wrap=True)
    for heading in ("host", "in", "out", "s per step", "hidden from"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in plan.rows:
        if (costs := _streaming(row, plan, speeds)) is not None:
            moved = (_gib(costs[part]) for part in ("host_bytes", "moved_in_bytes", "moved_out_bytes"))
            table.add_row(_label(row), *moved, f"{costs['step_s']:.2f}", f"{costs['hidden_from_tokens']} tokens")
    if not table.row_count:
        return
    console.print()
    console.print(table)
    console.print(
        "\n+co: with checkpointing, and with layers streamed from the host's memory (--offload). host: GiB there. in, out: GiB "
        f"moved per step, at {speeds.link_bytes_per_s / 1e9:g} GB/s each way. s per step: of products and transfers, at "
        f"{speeds.flops / 1e12:g} TFLOP/s. hidden from: tokens per step that take longer to compute than to transfer for.",
        markup=False,
        soft_wrap=True,
    )


def _streaming(row: Row, plan: Plan, speeds: Speeds) -> dict[str, Any] | None:
    """The costs of a row's streamed layers; None if it has none."""
    made = None if row.prediction is None else row.prediction.streaming
    if made is None:
        return None
    tokens = row.batch_size * plan.sequence_length
    return {
        "layers": made.layers,
        "host_bytes": made.host_bytes,
        "moved_in_bytes": made.moved_in_bytes,
        "moved_out_bytes": made.moved_out_bytes,
        "step_s": made.step_s(tokens, speeds, checkpointing=row.checkpointing),
        "hidden_from_tokens": made.hidden_from_tokens(speeds),
    }


def _to_type(plan: Plan) -> list[Row]:
    """For each method that fits, the fastest variant: without checkpointing, with it, with streamed layers."""
    fastest: dict[str, Row] = {}
    for row in plan.rows:
        if row.fits:
            fastest.setdefault(row.method, row)
    return list(fastest.values())


def _for_machines(plan: Plan, speeds: Speeds) -> dict[str, Any]:
    return {
        "model": plan.model,
        "device": plan.device,
        "memory_bytes": plan.memory_bytes,
        "host_bytes": plan.host_bytes,
        "link_bytes_per_s": speeds.link_bytes_per_s,
        "flops": speeds.flops,
        "sequence_length": plan.sequence_length,
        "note": plan.note,
        "rows": [
            {
                "method": row.method,
                "checkpointing": row.checkpointing,
                "offload": _streaming(row, plan, speeds),
                "batch_size": row.batch_size,
                "problem": row.problem,
                "phase": None if row.prediction is None else row.prediction.phase,
                "parts": None if row.prediction is None else row.prediction.parts,
                "peak_bytes": None if row.prediction is None else row.prediction.peak_bytes,
                "needed_bytes": None if row.prediction is None else row.prediction.needed_bytes,
                "fits": row.fits,
                "longest": row.longest,
                "command": row.command,
            }
            for row in plan.rows
        ],
    }


def _label(row: Row) -> str:
    if row.offload:
        return f"{row.method} +co"
    return f"{row.method} +c" if row.checkpointing else row.method


def _gib(size_bytes: int) -> str:
    size = size_bytes / GIB
    return f"{size:.2f}" if size < 10 else f"{size:.1f}"
