"""What sbft raises when the mistake can be mended by its user.

Each message is whole sentences: what was found, what was expected, what to type. The command line prints it as one
paragraph and ends with exit code 2; code that imports sbft can catch `SbftError` alone.
"""


class SbftError(Exception):
    """Base of every error that a user of sbft can mend."""


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
