"""The way to a Ray cluster, and the sentences on why there is none."""

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
"""The address that stands for a cluster of this machine alone, which ends with the runner."""
_CONNECT_S = 10.0
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def connect(address: str) -> Any:
    """Ray, connected to the cluster at an address.

    Raises:
        MissingPackageError: if Ray is not installed.
        ClusterError: if there is no cluster.
    """
    # Before the import: nothing is reported to anyone.
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
        # Ray's workers yield to every other process (15); these are timed. And where others keep the machine busy, Ray's
        # own processes need longer to start than the seconds that it gives them.
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
    """Refuse what nobody answers at: Ray itself would try for two minutes, and then end this process."""
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
        f"There is no Ray cluster to be reached at --ray {address}: {reason.rstrip('.')}. Begin one with `ray start "
        "--head`, which says its address, or take this machine alone: --ray local"
    )


def last_line(error: Exception) -> str:
    """What an error of Ray comes down to: its text holds the traceback of the worker."""
    lines = [line.strip() for line in _COLOR.sub("", str(error)).splitlines() if line.strip()]
    return without_secrets(lines[-1]) if lines else type(error).__name__
