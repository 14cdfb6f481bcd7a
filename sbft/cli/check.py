"""`sbft check`: what can be known about a run before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbft.cli.shared.errors import USER_ERROR
from sbft.cli.shared.options import (
    AllowPickleOption,
    DataOption,
    EvalDataOption,
    MethodOption,
    ModelOption,
    OutputOption,
    RecipeArgument,
    SetOption,
    TrustRemoteCodeOption,
    WeightsOption,
)
from sbft.cli.shared.recipe import recipe_of
from sbft.cli.shared.starting import loading_libraries
from sbft.cli.shared.verb import verb
from sbft.errors import SbftError
from sbft.native.sizes import gib
from sbft.recipe.methods import METHODS

if TYPE_CHECKING:
    from sbft.planning.check.check_recipe import Check
    from sbft.planning.check.finding import Finding
    from sbft.recipe import Recipe

_WIDTH = 80
_LABEL = 10
_TITLES = {"error": "Errors", "warning": "Warnings", "note": "Notes"}


@verb
def check(
    recipe: RecipeArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    eval_data: EvalDataOption = None,
    method: MethodOption = None,
    weights: WeightsOption = None,
    output_dir: OutputOption = None,
    overrides: SetOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    allow_pickle: AllowPickleOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that a recipe is valid and fits, and how long it takes.

    It also names what is likely to go wrong, and what to type to fix it. Nothing is trained.

    Exit code: 0 if nothing is wrong, 1 for warnings, 2 for errors.
    """
    try:
        settings = recipe_of(
            recipe,
            overrides,
            model=model,
            data=data,
            eval_data=eval_data,
            method=method,
            weights=weights,
            output_dir=output_dir,
            trust_remote_code=trust_remote_code or None,
            allow_pickle=allow_pickle or None,
        )
        with loading_libraries():
            from sbft.planning.check import check_recipe as planning
        result = planning.check(settings)
    except SbftError as error:
        if not as_json:
            raise
        _print_json({"valid": False, "problems": str(error), "findings": []})
        raise typer.Exit(USER_ERROR) from error
    if as_json:
        _print_json(_for_machines(result))
    else:
        print(_for_people(result))
    raise typer.Exit(result.exit_code)


def _for_people(result: Check) -> str:
    lines = [_labelled(label, text) for label, text in _summary(result).items()]
    for severity, title in _TITLES.items():
        findings = [finding for finding in result.findings if finding.severity == severity]
        if findings:
            lines += ["", f"{title}: {len(findings)}"]
        for finding in findings:
            lines += ["", *_described(finding)]
    verdict = ("Nothing is wrong.", "sbft train would print this and continue.", "Fix the errors before you train.")
    return "\n".join([*lines, "", verdict[result.exit_code]])


def _summary(result: Check) -> dict[str, str]:
    from sbft.native.memory import device_name
    from sbft.runs.description import describe_replay

    recipe, report, length = result.prepared.recipe, result.prepared.report, result.length
    rows = "examples" if report.packed_into is None else "rows"
    packed = "" if report.packed_into is None else f", packed into {report.packed_into:,} rows"
    replayed = f"; {describe_replay(report)}" if report.replay_examples else ""
    tokens = f"{length.tokens:,}" if length.exact else f"about {length.tokens:,}"
    epochs = f"{length.epochs:.3g} epoch{'s' * (length.epochs != 1)}"
    peak = "not known" if result.prediction is None else f"a peak of {gib(result.prediction.peak_bytes)}, predicted"
    return {
        "model": f"{recipe.model}, {_formats(recipe)}",
        "method": f"{recipe.method}: {METHODS[recipe.method].summary}",
        "data": f"{report.examples:,} examples, {report.tokens:,} tokens, the longest {report.longest:,}{packed}{replayed}",
        "run": f"{length.steps:,} steps on {length.rows:,} {rows}, {tokens} tokens, {epochs}",
        "memory": f"{peak}; {gib(result.available_bytes)} available",
        "time": _time(result),
        "device": device_name(),
    }


def _formats(recipe: Recipe) -> str:
    formats = recipe.dtype if recipe.grids is None else recipe.grids
    return ", ".join(f"{name}: {form}" for name, form in formats.items()) if isinstance(formats, dict) else str(formats)


def _time(result: Check) -> str:
    from sbft.bench.schedule import duration

    if result.duration is None:
        folder = result.prepared.recipe.output_dir
        return (
            f"unknown: no run of this model, method, batch and device is in {folder} or next to it. To measure "
            "it, type sbft batch-size, or sbft train with --set training.max_steps=20 --output-dir DIR"
        )
    data = "" if result.duration.same_data else ", on other data"
    return (
        f"about {duration(result.duration.train_s)} of training, if it is as fast as {result.duration.source} was"
        f"{data}: {result.duration.tokens_per_s:,.0f} tokens per second"
    )


def _described(finding: Finding) -> list[str]:
    fix = [] if finding.fix is None else [_to_type(finding.fix, "  fix: ")]
    return [_wrapped(finding.title, "", "  "), _wrapped(finding.why, "  ", "  "), *fix]


def _to_type(fix: str, first: str) -> str:
    """A fix in lines that can be pasted into a shell: flags that do not fit one line continue on the next."""
    indent = " " * len(first)
    if len(first + fix) <= _WIDTH:
        return first + fix
    if fix.startswith("--") and " --" in fix:
        return first + fix.replace(" --", f" \\\n{indent}--")
    return _wrapped(fix, first, indent)


def _labelled(label: str, text: str) -> str:
    return _wrapped(text, f"{label:<{_LABEL}}", " " * _LABEL)


def _wrapped(text: str, first: str, rest: str) -> str:
    """The text in lines within the width; words that are longer are not broken."""
    import textwrap

    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _for_machines(result: Check) -> dict[str, Any]:
    from dataclasses import asdict

    from sbft.native.memory import device_name

    recipe, prediction = result.prepared.recipe, result.prediction
    return {
        "valid": True,
        "exit_code": result.exit_code,
        "model": recipe.model,
        "method": recipe.method,
        "device": device_name(),
        "data": asdict(result.prepared.report),
        "run": asdict(result.length),
        "memory": {
            "predicted_peak_bytes": None if prediction is None else prediction.peak_bytes,
            "parts_bytes": None if prediction is None else prediction.parts,
            "phase": None if prediction is None else prediction.phase,
            "available_bytes": result.available_bytes,
        },
        "duration": None if result.duration is None else asdict(result.duration),
        "findings": [asdict(finding) for finding in result.findings],
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
    }


def _print_json(content: dict[str, Any]) -> None:
    import json

    print(json.dumps(content, indent=2))
