"""One command in several processes of this machine, as `torchrun` starts them, but with one error instead of many."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

_POLL_S = 0.2
# A rank that failed is often followed by the others for the same reason, of which one has yet to say it.
_PATIENCE_S = 5.0


def launch(arguments: list[str], processes: int) -> int:
    """Run `sbft ARGUMENTS` once per rank, and wait for all of them.

    Args:
        arguments: the command line after `sbft`.
        processes: how many.

    Returns:
        The exit code of the first rank that failed, 0 if none did. When one fails, the others are ended; on Ctrl-C,
        which reaches all of them, they are waited for, unless it comes twice. When this process is told to end
        (SIGTERM), so are they, and they are waited for likewise.
    """
    former = signal.signal(signal.SIGTERM, _leave)
    try:
        return _launch(arguments, processes)
    finally:
        signal.signal(signal.SIGTERM, former)


def _leave(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _launch(arguments: list[str], processes: int) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1))}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            environment = {**threads, **os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen([sys.executable, "-m", "sbft", *arguments], env=environment))
        return _wait(ranks)
    finally:
        _end(ranks)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """The exit code, once all have ended, or one has failed and the others had time to end of themselves."""
    interrupted = False
    patience = _PATIENCE_S
    while True:
        try:
            codes = [process.poll() for process in ranks]
            failed = [code for code in codes if code]
            if None not in codes or (failed and patience <= 0):
                if failed and not interrupted and not codes[0]:  # else the first rank has said why
                    rank = next(number for number, code in enumerate(codes) if code)
                    print(f"Error: Process {rank} of {len(codes)} failed (exit code {codes[rank]}).", file=sys.stderr)
                # A signal that ended a rank comes as its negative number; shells add 128 to it.
                return 0 if not failed else failed[0] if failed[0] > 0 else 128 - failed[0]
            time.sleep(_POLL_S)
            # A rank that stops on Ctrl-C ends with a code too, while another still writes the checkpoint.
            if failed and not interrupted:
                patience -= _POLL_S
        except KeyboardInterrupt as told:
            # On Ctrl-C the terminal has told the ranks too: they end their step, save, and stop.
            if interrupted:
                raise
            interrupted = True
            if told.args:
                for process in ranks:
                    process.terminate()


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
