"""What sbft raises when the mistake can be mended by its user.

Each message is whole sentences: what was found, what was expected, what to type. The command line prints it as one
paragraph and ends with exit code 2, or as the shell does with a command that was told to stop; code that imports sbft
can catch `SbftError` alone.
"""

from __future__ import annotations

import signal


class SbftError(Exception):
    """Base of every error that a user of sbft can fix."""


class RecipeError(SbftError):
    """A recipe, or an override of one, is not valid."""


class DataError(SbftError):
    """A data set is missing, malformed, empty, or holds what it must not hold."""


class ModelError(SbftError):
    """A model cannot be found, or cannot be trained by sbft."""


class MissingPackageError(SbftError):
    """A package of an optional extra is not installed."""


class TrainingError(SbftError):
    """A training run cannot go on."""


class DiskError(TrainingError):
    """What a run writes does not fit on the disk, or may not be written there."""


class LostRankError(TrainingError):
    """Another process of the same run has ended or does not answer: what went wrong, went wrong there."""


class Interrupted(TrainingError):
    """Somebody told the command to stop.

    Args:
        number: the signal: SIGINT is Ctrl-C.
        rest: what follows "Stopped by Ctrl-C", its punctuation too.

    Attributes:
        exit_code: 128 and the signal's number, as shells have it: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, number: int, rest: str = ".") -> None:
        super().__init__(f"Stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}{rest}")
        self.exit_code = 128 + number


def signal_of(interrupt: KeyboardInterrupt) -> int:
    """The signal behind a KeyboardInterrupt: sbft's handlers put its number in, Python's own for Ctrl-C nothing."""
    number: int = interrupt.args[0] if interrupt.args else signal.SIGINT
    return number


class ExportError(SbftError):
    """A trained model cannot be written in the form that was asked for."""


class ClusterError(SbftError):
    """A Ray cluster cannot be reached, or its machines cannot make runs."""
