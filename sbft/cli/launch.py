"""One command in several processes of this machine, as `torchrun` starts them, but with one error instead of many."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

_POLL_S = 0.2


def launch(arguments: list[str], processes: int) -> int:
    """Run `sbft ARGUMENTS` once per rank, and wait for all of them.

    Args:
        arguments: the command line after `sbft`.
        processes: how many.

    Returns:
        The exit code of the first rank that failed, 0 if none did. When one fails, the others are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1))}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "sbft", *arguments],
            env={**threads, **os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    try:
        return _wait(ranks)
    finally:
        for process in ranks:
            process.terminate()
        for process in ranks:
            process.wait()


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in ranks]
        failed = [code for code in codes if code]
        if failed:
            return failed[0] if failed[0] > 0 else 1
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_S)


def is_silent_rank() -> bool:
    """Whether this process is one of several and not the one that speaks."""
    return os.environ.get("RANK", "0") != "0"
