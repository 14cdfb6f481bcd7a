"""The seconds in which a verb imports its libraries: Ctrl-C ends them with a message, and garbage collection is off."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDED_BY_CTRL_C = 128 + signal.SIGINT  # as in shells


@contextmanager
def starting() -> Iterator[None]:
    """Wrap imports: Ctrl-C ends the process at once, and they are not slowed down by garbage collection."""
    with _ctrl_c_ends_at_once(), _no_garbage_collection():
        yield


@contextmanager
def loading_libraries() -> Iterator[None]:
    """The same around imports of torch, transformers and datasets; also turns off their own messages and progress bars."""
    with starting():
        from sbft.cli.shared.quiet import quiet_libraries

        quiet_libraries()
        yield


@contextmanager
def _ctrl_c_ends_at_once() -> Iterator[None]:
    """Ctrl-C ends the process with a paragraph: inside an import, KeyboardInterrupt may turn into any other error."""
    # Only the main thread may set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if former is _end else former)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Imports leave no garbage, but the collector would traverse their objects again and again: a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # modules stay, so later collections skip them
        atexit.register(_thaw_triton)
        if enabled:
            gc.enable()


def _thaw_triton() -> None:
    """Let the process's last collection reach Triton (3.9 and later), which otherwise prints a page about leaks.

    Only if Triton is loaded: that collection takes about half a second.
    """
    if "triton._C.libtriton" in sys.modules:
        gc.unfreeze()


def end_at_once_on_ctrl_c() -> None:
    """From now on, until `starting` is left, Ctrl-C ends the process with a paragraph."""
    signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    # Not by `sys.exit`, which a library's `except` could swallow.
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"Error: Stopped by Ctrl-C.\n")
    os._exit(_ENDED_BY_CTRL_C)
