"""Connects to a Ray cluster, and explains why a connection failed."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from typing import Any

from sbft.errors import ClusterError, MissingPackageError, without_secrets

LOCAL = "local"
"""The address that means a cluster of this machine alone, which ends with the runner."""
_CONNECT_S = 10.0
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def connect(address: str) -> Any:
    """Connect to the cluster at an address; returns the module `ray`.

    Raises:
        MissingPackageError: if Ray is not installed.
        ClusterError: if there is no cluster.
    """
    # Ray reads this during its import: it must not send usage statistics.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError(
            f"--ray gives the runs to Ray, which is not installed ({error}). Type: pip install 'ray>=2.60'"
        ) from error
    _check_reachable(address)
    own: dict[str, Any] = {}
    if address == LOCAL:
        own = {"include_dashboard": False}
        # By default, Ray's workers have the lowest priority (nice 15), but these runs are timed. And on a busy machine, Ray's
        # own processes take longer to start than Ray waits for them.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # Ray raises Exception itself where a machine is too slow for it
        raise _not_there(address, last_line(error)) from error
    finally:
        if main:
            signal.signal(signal.SIGTERM, handler)
    return ray


def _check_reachable(address: str) -> None:
    """Refuse an address that does not answer: Ray itself would try for two minutes, and then end this process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise _not_there(address, str(error)) from error


def _not_there(address: str, reason: str) -> ClusterError:
    if address == LOCAL:
        return ClusterError(f"Ray could not be started on this machine: {reason} Try again, or leave --ray out.")
    return ClusterError(
        f"No Ray cluster answers at --ray {address}: {reason.rstrip('.')}. Start one with `ray start --head`, which prints "
        "its address, or use this machine alone: --ray local"
    )


def last_line(error: Exception) -> str:
    """The last line of one of Ray's errors, which contain the worker's traceback."""
    lines = [line.strip() for line in _COLOR.sub("", str(error)).splitlines() if line.strip()]
    return without_secrets(lines[-1]) if lines else type(error).__name__
