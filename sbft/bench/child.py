"""The process of one run. On Linux it ends with the runner that started it, however that ends.

`python -m sbft.bench.child RUNNER_PID ARGUMENTS` becomes `python -m sbft ARGUMENTS`. A file of its own, because what
Python can run between fork and exec instead may deadlock where the runner has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main() -> None:
    """Take the place of this process."""
    runner, arguments = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # It may have ended before the line above.
        if os.getppid() != runner:
            sys.exit("The runner has ended.")
    os.execv(sys.executable, [sys.executable, "-m", "sbft", *arguments])  # nosec B606  # this very Python


main()
