"""`sbft check`: what can be said of a run before it begins."""

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


def _for_people(found: Check) -> str:
    lines = [_labelled(label, text) for label, text in _summary(found).items()]
    for severity, title in _TITLES.items():
        those = [finding for finding in found.findings if finding.severity == severity]
        if those:
            lines += ["", f"{title}: {len(those)}"]
        for finding in those:
            lines += ["", *_described(finding)]
    verdict = ("Nothing is wrong.", "sbft train would print this and continue.", "Fix the errors before you train.")
    return "\n".join([*lines, "", verdict[found.exit_code]])


def _summary(found: Check) -> dict[str, str]:
    from sbft.native.memory import device_name

    chosen, report, length = found.prepared.recipe, found.prepared.report, found.length
    rows = "examples" if report.packed_into is None else "rows"
    packed = "" if report.packed_into is None else f", packed into {report.packed_into:,} rows"
    tokens = f"{length.tokens:,}" if length.exact else f"about {length.tokens:,}"
    epochs = f"{length.epochs:.3g} epoch{'s' * (length.epochs != 1)}"
    peak = "not known" if found.prediction is None else f"a peak of {gib(found.prediction.peak_bytes)}, predicted"
    return {
        "model": f"{chosen.model}, {chosen.dtype}",
        "method": f"{chosen.method}: {METHODS[chosen.method].summary}",
        "data": f"{report.examples:,} examples, {report.tokens:,} tokens, the longest {report.longest:,}{packed}",
        "run": f"{length.steps:,} steps on {length.rows:,} {rows}, {tokens} tokens, {epochs}",
        "memory": f"{peak}; {gib(found.available_bytes)} available",
        "time": _time(found),
        "device": device_name(),
    }


def _time(found: Check) -> str:
    from sbft.bench.schedule import duration

    if found.duration is None:
        folder = found.prepared.recipe.output_dir
        return (
            f"unknown: no run of this model, method, batch and device is in {folder} or beside it. sbft "
            "batch-size measures it, or sbft train with --set training.max_steps=20 --output-dir DIR"
        )
    data = "" if found.duration.same_data else ", on other data"
    return (
        f"about {duration(found.duration.train_s)} of training, if it is as fast as {found.duration.source} was"
        f"{data}: {found.duration.tokens_per_s:,.0f} tokens a second"
    )


def _described(finding: Finding) -> list[str]:
    mend = [] if finding.mend is None else [_to_type(finding.mend, "  fix: ")]
    return [_wrapped(finding.title, "", "  "), _wrapped(finding.why, "  ", "  "), *mend]


def _to_type(mend: str, first: str) -> str:
    """Flags that do not fit one line go on in the next, as a shell takes them."""
    others = " " * len(first)
    if len(first + mend) <= _WIDTH:
        return first + mend
    if mend.startswith("--") and " --" in mend:
        return first + mend.replace(" --", f" \\\n{others}--")
    return _wrapped(mend, first, others)


def _labelled(label: str, text: str) -> str:
    return _wrapped(text, f"{label:<{_LABEL}}", " " * _LABEL)


def _wrapped(text: str, first: str, others: str) -> str:
    """The text in lines within the width, except for words that are longer."""
    import textwrap

    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _for_machines(found: Check) -> dict[str, Any]:
    from dataclasses import asdict

    from sbft.native.memory import device_name

    chosen, prediction = found.prepared.recipe, found.prediction
    return {
        "valid": True,
        "exit_code": found.exit_code,
        "model": chosen.model,
        "method": chosen.method,
        "device": device_name(),
        "data": asdict(found.prepared.report),
        "run": asdict(found.length),
        "memory": {
            "predicted_peak_bytes": None if prediction is None else prediction.peak_bytes,
            "parts_bytes": None if prediction is None else prediction.parts,
            "phase": None if prediction is None else prediction.phase,
            "available_bytes": found.available_bytes,
        },
        "duration": None if found.duration is None else asdict(found.duration),
        "findings": [asdict(finding) for finding in found.findings],
        "recipe": chosen.model_dump(mode="json", exclude_none=True),
    }


def _print_json(content: dict[str, Any]) -> None:
    import json

    print(json.dumps(content, indent=2))
