"""The process of one run. On Linux it ends when its runner ends, even if the runner is killed.

`python -m sbft.bench.child RUNNER_PID ARGUMENTS` becomes `python -m sbft ARGUMENTS`. This is a separate module, because
a `preexec_fn` may deadlock where the runner has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main() -> None:
    """Replace this process by `python -m sbft`."""
    runner, arguments = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # The runner may have ended before the line above.
        if os.getppid() != runner:
            sys.exit("The runner has ended.")
    os.execv(sys.executable, [sys.executable, "-m", "sbft", *arguments])  # nosec B606  # this very Python


main()
