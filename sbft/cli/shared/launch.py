"""One command in several processes of this machine, as `torchrun` starts them, but with one error instead of many."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from sbft.cli.shared import rank_errors

_POLL_S = 0.2
# A rank that failed is often followed by the others for the same reason, of which one has yet to say it.
_PATIENCE_S = 5.0


def launch(arguments: list[str], processes: int) -> int:
    """Run `sbft ARGUMENTS` once per rank, and wait for all of them.

    Args:
        arguments: the command line after `sbft`.
        processes: how many.

    Returns:
        The exit code of the rank that failed first, 0 if none did. When one fails, the others are ended; on Ctrl-C,
        which reaches all of them, they are waited for, unless it comes twice. When this process is told to end
        (SIGTERM), so are they, and they are waited for likewise.
    """
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        # Raising here would lose a rank that is being started: it would run on.
        told.append(number)

    former = signal.signal(signal.SIGTERM, note)
    try:
        return _launch(arguments, processes, told)
    finally:
        signal.signal(signal.SIGTERM, former)


def _launch(arguments: list[str], processes: int, told: Sequence[int]) -> int:
    import tempfile

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1))}
    ranks: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        errors = [Path(folder) / f"rank-{rank}.json" for rank in range(processes)]
        try:
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), rank_errors.VARIABLE: str(errors[rank])}
                ranks.append(start_rank(arguments, {**threads, **os.environ, **common, **own}))
            return _wait(ranks, errors, told)
        finally:
            _end(ranks)


def start_rank(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """`sbft ARGUMENTS` in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "sbft", *arguments], env=environment)


def _wait(ranks: list[subprocess.Popen[bytes]], errors: Sequence[Path] = (), told: Sequence[int] = ()) -> int:
    """The exit code, once all have ended, or one has failed and the others had time to end of themselves.

    Args:
        ranks: the processes.
        errors: the files in which each leaves why it failed.
        told: grows when this process is told to end.

    Raises:
        KeyboardInterrupt: if that, or Ctrl-C, comes twice.
    """
    interrupted = ended = False
    patience = _PATIENCE_S
    first: int | None = None
    while True:
        try:
            if told and not ended:
                interrupted = ended = True
                for process in ranks:
                    process.terminate()
            if len(told) > 1:
                raise KeyboardInterrupt(told[-1])
            codes = [process.poll() for process in ranks]
            if first is None:
                failed = [rank for rank, code in enumerate(codes) if code]
                # Of two that ended between two looks, the one that a signal ended is the cause, and the other lost it.
                first = min(failed, key=lambda rank: (codes[rank] or 0) > 0, default=None)
            if None not in codes or (first is not None and patience <= 0):
                if first is None:
                    return 0
                code = codes[first] or 0
                if not interrupted:
                    _tell(first, codes, [rank_errors.left(file) for file in errors])
                # A signal that ended a rank comes as its negative number; shells add 128 to it.
                return code if code > 0 else 128 - code
            time.sleep(_POLL_S)
            # A rank that stops on Ctrl-C ends with a code too, while another still writes the checkpoint.
            if first is not None and not interrupted:
                patience -= _POLL_S
        except KeyboardInterrupt:
            # On Ctrl-C the terminal has told the ranks too: they end their step, save, and stop.
            if interrupted:
                raise
            interrupted = True


def _tell(first: int, codes: list[int | None], errors: list[str | None]) -> None:
    """Say which rank failed first, and why, unless it has said so itself.

    Args:
        first: that rank.
        codes: of all ranks: the exit code, minus the signal that ended it, None while it runs.
        errors: what each has left for this.
    """
    code, reason = codes[first] or 0, errors[first] if errors else None
    which = f"Process {first} of {len(codes)}"
    if code < 0:
        memory = ", as the kernel does where memory runs out" if -code == signal.SIGKILL else ""
        # Rank 0 says from which checkpoint, if it has outlived the other.
        way = " If there is a checkpoint, the same command with --resume continues from it."
        name = signal.Signals(-code).name
        said = f"{which} was ended by signal {-code} ({name}){memory}.{'' if first != 0 and codes[0] else way}"
    elif first == 0 or (code, reason) == (codes[0], errors[0] if errors else None):
        return  # rank 0 has said why
    else:
        said = f"{which} failed (exit code {code})." if reason is None else f"{which} failed: {reason}"
    print(f"Error: {said}", file=sys.stderr)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End those that still run, first by asking."""
    for process in ranks:
        process.terminate()
    for process in ranks:
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            # It waits for another rank inside a library, where no signal handler of Python's is called.
            process.kill()
            process.wait()


def is_silent_rank() -> bool:
    """Whether this process is one of several and not the one that speaks."""
    return os.environ.get("RANK", "0") != "0"


def is_silent_in_errors() -> bool:
    """Whether another process of this machine says what went wrong; one of each node does, where the cause may lie."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) != "0"
