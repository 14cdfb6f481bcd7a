"""Ctrl-C while the command starts: an interrupt inside an import would come out as any error, or as a traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_USER_ERROR = 2


@contextmanager
def ctrl_c_ends_at_once() -> Iterator[None]:
    """While imports run, of which nothing is left behind, Ctrl-C says so in a paragraph and ends the process."""
    # Only the main thread may set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if former is _end else former)


def end_at_once_on_ctrl_c() -> None:
    """As `ctrl_c_ends_at_once`, until one that is entered later is left."""
    signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    # Not through `sys.exit`, which a library's `except` or a half-made module could swallow.
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"Error: Stopped by Ctrl-C.\n")
    os._exit(_USER_ERROR)
