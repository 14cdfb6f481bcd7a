"""How the command line shows a mistake: one red paragraph and exit code 2, a traceback only on request."""

from __future__ import annotations

import sys
import traceback as tracebacks
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from sbft.cli.shared import rank_errors
from sbft.cli.shared.launch import is_silent_in_errors
from sbft.errors import Interrupted, LostRankError, SbftError, signal_of, without_secrets

USER_ERROR = 2
FAULT = 1

@contextmanager
def shown_as_a_paragraph(traceback: bool) -> Iterator[None]:
    """Turn an error into a paragraph on stderr and an exit code.

    The code is 2 if the user can fix it, 1 if it may be a bug of sbft, and 130 or 143 after Ctrl-C or SIGTERM.
    """
    try:
        yield
    except Interrupted as stopped:
        _show(str(stopped), traceback)
        raise typer.Exit(stopped.exit_code) from stopped
    except LostRankError as error:
        _show(str(error), traceback)  # not written for the launcher, which reports the cause
        raise typer.Exit(USER_ERROR) from error
    except SbftError as error:
        rank_errors.leave(without_secrets(str(error)))
        _show(str(error), traceback)
        raise typer.Exit(USER_ERROR) from error
    except KeyboardInterrupt as interrupt:
        at_once = Interrupted(signal_of(interrupt))
        _show(str(at_once), traceback)
        raise typer.Exit(at_once.exit_code) from interrupt
    except BrokenPipeError:
        # The reader of the output, such as `head`, is gone.
        sys.stderr.close()
        raise typer.Exit(FAULT) from None
    except Exception as error:
        if isinstance(error, typer.Exit):
            raise
        hint = "" if traceback else " This may be a bug in sbft. To see where, type the same command with --traceback."
        rank_errors.leave(without_secrets(f"{type(error).__name__}: {error}"))
        _show(f"{type(error).__name__}: {error}.{hint}", traceback)
        raise typer.Exit(FAULT) from error


def _show(message: str, traceback: bool) -> None:
    if is_silent_in_errors():
        return
    if traceback:
        tracebacks.print_exc()
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
    # The output of a suite's run is kept as its log, so secrets are hidden.
    console.print(f"Error: {without_secrets(message)}", style="red", markup=False)
