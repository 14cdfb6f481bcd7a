"""The typer application: its verbs, and how a mistake is shown."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from sbft.cli import (
    batch_size,
    bench,
    check,
    evaluate,
    export,
    generate,
    plan,
    prepare_data,
    pretrain,
    recipes,
    report,
    train,
    version,
)
from sbft.cli.shared.quiet import quiet_imports

GROUPS = {
    "Train": ("recipes", "train", "pretrain", "prepare-data"),
    "Know before you run": ("check", "plan", "batch-size"),
    "Compare": ("eval", "bench", "report"),
    "Ship": ("generate", "export"),
    "When something is wrong": ("version",),
}
"""The verbs in the order in which `sbft --help` and the shell's completion show them."""


class _Verbs(TyperGroup):
    """Verbs in groups. Typer itself groups them only in panels drawn by rich, which take twice the time."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for names in GROUPS.values() for name in names]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, self.commands))
        for title, names in GROUPS.items():
            with formatter.section(title):
                # Padded, so that the summaries of all groups are aligned.
                formatter.write_dl(
                    [(f"{name:<{width}}", self.commands[name].get_short_help_str(formatter.width)) for name in names]
                )


# Without markup, the help is plain text and does not load rich: `sbft --help` takes half the time.
app = typer.Typer(
    name="sbft",
    cls=_Verbs,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root() -> None:
    """Fine-tune all weights of a language model at batch size 1, in about the memory that LoRA needs.

    Begin with: sbft recipes ls
    """


app.command("check")(check.check)
app.command("train")(train.train)
app.command("pretrain")(pretrain.pretrain)
app.command("prepare-data")(prepare_data.prepare_data)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("export")(export.export)
app.command("plan")(plan.plan)
app.command("batch-size")(batch_size.batch_size)
app.command("bench")(bench.bench)
app.command("report")(report.report)
app.add_typer(recipes.app, name="recipes")
app.command("version")(version.version)


def main() -> None:
    """Run the `sbft` command."""
    quiet_imports()
    app()
