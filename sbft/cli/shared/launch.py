"""One command in several processes on this machine: as with `torchrun`, but with one error instead of many."""

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
# Often all ranks fail for the same reason, one after another. They get this long to say why.
_PATIENCE_S = 5.0


def launch(arguments: list[str], processes: int) -> int:
    """Run `sbft ARGUMENTS` once per rank, and wait for all of them.

    Args:
        arguments: the command line after `sbft`.
        processes: how many.

    Returns:
        The exit code of the rank that failed first, 0 if none did. When one fails, the others are ended. Ctrl-C reaches
        all of them, and SIGTERM is passed on; then this process waits for them, until a second signal comes.
    """
    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        # Raising here could lose a rank that is being started, which would keep running.
        signals.append(number)

    former = signal.signal(signal.SIGTERM, note)
    try:
        return _launch(arguments, processes, signals)
    finally:
        signal.signal(signal.SIGTERM, former)


def _launch(arguments: list[str], processes: int, signals: Sequence[int]) -> int:
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
            return _wait(ranks, errors, signals)
        finally:
            _end(ranks)


def start_rank(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """`sbft ARGUMENTS` in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "sbft", *arguments], env=environment)


def _wait(ranks: list[subprocess.Popen[bytes]], errors: Sequence[Path] = (), signals: Sequence[int] = ()) -> int:
    """The exit code, once all ranks have ended, or one has failed and the others had time to end by themselves.

    Args:
        ranks: their processes.
        errors: the files in which each rank leaves why it failed.
        signals: grows when this process gets SIGTERM.

    Raises:
        KeyboardInterrupt: if a second SIGTERM or Ctrl-C comes.
    """
    interrupted = ended = False
    patience = _PATIENCE_S
    first: int | None = None
    while True:
        try:
            if signals and not ended:
                interrupted = ended = True
                for process in ranks:
                    process.terminate()
            if len(signals) > 1:
                raise KeyboardInterrupt(signals[-1])
            codes = [process.poll() for process in ranks]
            if first is None:
                failed = [rank for rank, code in enumerate(codes) if code]
                # If two ended since the last poll, the one that a signal ended is the cause: the other lost its peer.
                first = min(failed, key=lambda rank: (codes[rank] or 0) > 0, default=None)
            if None not in codes or (first is not None and patience <= 0):
                if first is None:
                    return 0
                code = codes[first] or 0
                if not interrupted:
                    _tell(first, codes, [rank_errors.left(file) for file in errors])
                # Popen gives a signal as its negative number; shells add 128 to the number.
                return code if code > 0 else 128 - code
            time.sleep(_POLL_S)
            # On Ctrl-C too a rank ends with a code, while another still writes the checkpoint.
            if first is not None and not interrupted:
                patience -= _POLL_S
        except KeyboardInterrupt:
            # The terminal sends Ctrl-C to the ranks too. They end their step, save, and stop.
            if interrupted:
                raise
            interrupted = True


def _tell(first: int, codes: list[int | None], errors: list[str | None]) -> None:
    """Print which rank failed first, and why, unless rank 0 has said so itself.

    Args:
        first: that rank.
        codes: for each rank its exit code, or minus the signal that ended it; None while it runs.
        errors: what each rank has left; None if nothing.
    """
    code, reason = codes[first] or 0, errors[first] if errors else None
    which = f"Process {first} of {len(codes)}"
    if code < 0:
        memory = ", as the kernel does when memory runs out" if -code == signal.SIGKILL else ""
        # If rank 0 has outlived this one, it names the checkpoint.
        way = " If there is a checkpoint, the same command with --resume continues from it."
        name = signal.Signals(-code).name
        message = f"{which} was ended by signal {-code} ({name}){memory}.{'' if first != 0 and codes[0] else way}"
    elif first == 0 or (code, reason) == (codes[0], errors[0] if errors else None):
        return  # rank 0 has said why
    else:
        message = f"{which} failed (exit code {code})." if reason is None else f"{which} failed: {reason}"
    print(f"Error: {message}", file=sys.stderr)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End those that still run: by SIGTERM, then by SIGKILL."""
    for process in ranks:
        process.terminate()
    for process in ranks:
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            # It waits for another rank inside a library, where Python's signal handlers are not called.
            process.kill()
            process.wait()


def is_silent_rank() -> bool:
    """Whether this process is one of several and not the one that prints."""
    return os.environ.get("RANK", "0") != "0"


def is_silent_in_errors() -> bool:
    """Whether another process on this machine prints errors. One per node does, because the cause may be local."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) != "0"
