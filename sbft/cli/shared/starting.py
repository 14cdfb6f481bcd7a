"""The seconds in which a verb imports what it needs: Ctrl-C ends it in a sentence, and nothing else takes time."""

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

_ENDED_BY_CTRL_C = 128 + signal.SIGINT  # as shells have it


@contextmanager
def starting() -> Iterator[None]:
    """Around imports, of which nothing is left behind if they are interrupted."""
    with _ctrl_c_ends_at_once(), _no_garbage_collection():
        yield


@contextmanager
def loading_libraries() -> Iterator[None]:
    """The same around imports of torch, transformers and datasets, whose own notes and bars are off from then on."""
    with starting():
        from sbft.cli.shared.quiet import quiet_libraries

        quiet_libraries()
        yield


@contextmanager
def _ctrl_c_ends_at_once() -> Iterator[None]:
    """Ctrl-C says so in a paragraph and ends the process: inside an import it would come out as any error."""
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
    """Imports leave no garbage, but the collector walks all they have made again and again: a fifth of their time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # modules stay: later collections pass over them
        atexit.register(_thaw_triton)
        if enabled:
            gc.enable()


def _thaw_triton() -> None:
    """Let the process's last collection reach Triton, which prints a page about leaks (from 3.9 on) where it is passed over.

    Only then: that collection takes about half a second.
    """
    if "triton._C.libtriton" in sys.modules:
        gc.unfreeze()


def end_at_once_on_ctrl_c() -> None:
    """From now on Ctrl-C ends the process in a paragraph, until `starting` is entered and left."""
    signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    # Not through `sys.exit`, which a library's `except` or a half-made module could swallow.
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"Error: Stopped by Ctrl-C.\n")
    os._exit(_ENDED_BY_CTRL_C)
