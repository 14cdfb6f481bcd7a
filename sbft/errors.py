"""The errors that sbft raises for mistakes that its user can fix.

Each message is in whole sentences: what was found, what was expected, what to type. The command line prints it as one
paragraph. It exits with code 2, or with the shell's code for a signal if the command was stopped by one. Code that imports
sbft can catch `SbftError` alone.

What messages have in common is here too: secrets are hidden, and for a missing package there is the command that installs it.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path


class SbftError(Exception):
    """Base of every error that a user of sbft can fix."""


class RecipeError(SbftError):
    """A recipe, or an override of one, is not valid."""


class DataError(SbftError):
    """A data set is missing, malformed or empty, or has contents that are not allowed."""


class ModelError(SbftError):
    """A model cannot be found, or cannot be trained by sbft."""


class MissingPackageError(SbftError):
    """A package of an optional extra is not installed."""


class TrainingError(SbftError):
    """A training run cannot continue."""


class DiskError(TrainingError):
    """What a run writes does not fit on the disk, or may not be written there."""


class LostRankError(TrainingError):
    """Another process of the same run has ended or does not answer. The cause is in that process."""


class Interrupted(TrainingError):
    """A signal stopped the command.

    Args:
        number: the signal: SIGINT is Ctrl-C.
        rest: what follows "Stopped by Ctrl-C" in the message, including punctuation.

    Attributes:
        exit_code: 128 plus the signal's number, as in shells: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, number: int, rest: str = ".") -> None:
        super().__init__(f"Stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}{rest}")
        self.exit_code = 128 + number


def signal_of(interrupt: KeyboardInterrupt) -> int:
    """The signal behind a KeyboardInterrupt: sbft's handlers put its number in; Python's own, for Ctrl-C, does not."""
    number: int = interrupt.args[0] if interrupt.args else signal.SIGINT
    return number


class ExportError(SbftError):
    """A trained model cannot be written in the requested form."""


class ClusterError(SbftError):
    """A Ray cluster cannot be reached, or its machines cannot run a suite."""


HIDDEN = "***"
_SECRET = re.compile(
    r"(?<=://)[^/\s@]+(?=@)"  # https://user:password@host
    r"|\bhf_[A-Za-z0-9]{16,}|\bapi_org_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\bsk-[A-Za-z0-9_-]{16,}|\bxox[abprs]-[A-Za-z0-9-]{8,}"
)
_NAME_OF_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_SHORTEST = 8
"""Shortest value of an environment variable that counts as a secret, in characters: `1` and `true` do not."""


def holds_secret(text: str) -> bool:
    """Whether a text holds what looks like a password or a token."""
    return _SECRET.search(text) is not None


def names_secret(variable: str) -> bool:
    """Whether an environment variable of this name is likely to hold a password or a token."""
    return _NAME_OF_SECRET.search(variable) is not None


def without_secrets(text: str) -> str:
    """The text with `***` in place of passwords and tokens, including those in the environment."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and names_secret(name) and not value.startswith("/"):
            text = text.replace(value, HIDDEN)
    return _SECRET.sub(HIDDEN, text)


SETUP = Path(__file__).parent.parent / "scripts" / "setup.sh"
"""Installs what the methods and the built-in model need; only a checkout has it."""


def how_to_install(pip_arguments: str) -> str:
    """The end of a message about a missing package.

    Args:
        pip_arguments: arguments for pip that install it if pip installed sbft, such as `'sbft[lora]'`.
    """
    if not SETUP.is_file():
        return f"Type: pip install {pip_arguments}"
    script = SETUP.relative_to(Path.cwd()) if SETUP.is_relative_to(Path.cwd()) else SETUP
    return f"Type: bash {script}"
