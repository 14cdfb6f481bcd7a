"""Passwords and tokens: how they are recognized, and what stands in their place in whatever is written or shown."""

from __future__ import annotations

import os
import re

HIDDEN = "***"
_SECRET = re.compile(
    r"(?<=://)[^/\s@]+(?=@)"  # https://user:password@host
    r"|\bhf_[A-Za-z0-9]{16,}|\bapi_org_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\bsk-[A-Za-z0-9_-]{16,}|\bxox[abprs]-[A-Za-z0-9-]{8,}"
)
_NAME_OF_ONE = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_SHORTEST = 8
"""Characters of an environment variable's value that is taken for a secret: `1` and `true` are none."""


def holds_secret(text: str) -> bool:
    """Whether a text holds what looks like a password or a token."""
    return _SECRET.search(text) is not None


def names_secret(variable: str) -> bool:
    """Whether an environment variable of this name is likely to hold a password or a token."""
    return _NAME_OF_ONE.search(variable) is not None


def without_secrets(text: str) -> str:
    """The text with `***` in the place of passwords and tokens, those among them that the environment holds."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and names_secret(name) and not value.startswith("/"):
            text = text.replace(value, HIDDEN)
    return _SECRET.sub(HIDDEN, text)
