"""Checks at once whether the Hugging Face hub can be reached, instead of after half a minute of retries."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from urllib.parse import urlsplit

_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@cache
def hub_reachable() -> bool:
    """Whether the hub can probably be reached: it is not switched off, and its name resolves or there is a proxy.

    Files in the hub's local cache load without it (`local_files_only`).
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        return False
    return True


def hub_state() -> str:
    """A clause for error messages: why the hub was not asked."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the hub is switched off by HF_HUB_OFFLINE"
    return f"the hub ({constants.ENDPOINT}) cannot be reached from this machine"


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Switch the hub's clients to offline mode, in which they use their caches, while the hub cannot be reached.

    For libraries without an argument for that: they would retry for half a minute before they look into their cache.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not hub_reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
