"""Random text, `generated:random_text`: rows of one or many lengths, for measurements to which the content does not matter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sbft.errors import DataError

NAME = "random_text"
# Printable ASCII without the space: every character is one byte, and no two rows differ in spaces only.
_FIRST, _LAST = ord("!"), ord("~")
_DEFAULT_LENGTH = 1024
_LONGEST = 1 << 24


def rows(*, start: int, options: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yields an endless stream of texts; the same arguments give the same texts.

    Args:
        start: seed of the first row; each further row has the next seed.
        options: `length` (default 1024) is the number of tokens of a row with a byte tokenizer, such as that of the
            `random:` models. The last token is the end token, so the text has one character less. Other tokenizers make
            fewer tokens of a text: give a length that is certainly enough, and data.max_length cuts it. With
            `shortest`, the length of each row is drawn uniformly from `shortest` to `length`.

    Yields:
        {"text": the text}.

    Raises:
        DataError: an option is unknown or out of range.
    """
    import numpy as np

    shortest, longest = _lengths(options)
    while True:
        generator = np.random.default_rng(start)
        length = longest if shortest == longest else int(generator.integers(shortest, longest, endpoint=True))
        drawn = generator.integers(_FIRST, _LAST, size=length - 1, dtype=np.uint8, endpoint=True)
        yield {"text": drawn.tobytes().decode("ascii")}
        start += 1


def _lengths(options: dict[str, Any]) -> tuple[int, int]:
    if unknown := sorted(set(options) - {"length", "shortest"}):
        raise DataError(
            f"The task generated:{NAME} has no option {', '.join(map(repr, unknown))}; it has length and shortest. "
            "Correct data.options."
        )
    length = _tokens("length", options.get("length", _DEFAULT_LENGTH), _LONGEST)
    return _tokens("shortest", options.get("shortest", length), length), length


def _tokens(name: str, value: Any, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value <= most:
        raise DataError(
            f"The option {name} of generated:{NAME} is {value!r}; expected a number of tokens from 2 to {most:,}, such as "
            "data: {options: {length: 1024}, max_length: 1024}."
        )
    return value
