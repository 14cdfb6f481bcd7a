"""What all verbs of the command line share: the option `--traceback`, and errors shown as a paragraph."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from sbft.cli.shared.errors import shown_as_a_paragraph

_Traceback = Annotated[bool, typer.Option("--traceback", help="Show where in the code an error was raised.")]


def verb(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a function into a verb; its parameters are the verb's arguments and options.

    It gets the option `--traceback`, and its errors become a paragraph and an exit code.
    """
    # Evaluated here, because typer does not evaluate the signature that a decorator has made.
    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter(
        "traceback", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=False, annotation=_Traceback
    )

    @wraps(command)
    def shown(*arguments: Any, traceback: bool = False, **options: Any) -> None:
        with shown_as_a_paragraph(traceback):
            command(*arguments, **options)

    parameters = [*signature.parameters.values(), option]
    shown.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    shown.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return shown
