"""The true peak of this process, and what its parts weigh: bytes everywhere, as ints."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sbft.native.memory_pool import trim_pool

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MEMORY = Path("/proc/meminfo")
# Of a container, by the second and the first version of control groups.
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_RESET_HIGHEST = "5"  # proc(5): sets the highest resident size back to the current one


class PeakMemory:
    """The highest memory this process held between entering and leaving; a context manager.

    On CUDA it is what torch allocated on all visible devices. Elsewhere it is the resident memory of the process: on
    Linux its highest value is set back at the start. Where that is not possible, `note` says so, and the peak is that
    of the process's whole life so far, which is never too low. While entered, the peak so far can be read.

    Args:
        device: what the work runs on; CUDA where there is one, when None.

    Attributes:
        baseline_bytes: held on entering.
        peak_bytes: highest since.
        reserved_peak_bytes: on CUDA the highest that torch reserved, else None.
        kind: "cuda_allocated" or "resident".
        note: what limits the measurement, or None.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.kind = "cuda_allocated" if type_of(device) == "cuda" else "resident"
        self.note: str | None = None
        self.baseline_bytes = 0
        self._peak_bytes = 0
        self._reserved_peak_bytes: int | None = None
        self._running = False

    @property
    def peak_bytes(self) -> int:
        """Highest so far; after leaving, highest within."""
        self._read()
        return self._peak_bytes

    @property
    def reserved_peak_bytes(self) -> int | None:
        """Highest that torch reserved on CUDA, None elsewhere."""
        self._read()
        return self._reserved_peak_bytes

    def __enter__(self) -> PeakMemory:
        self.note = None
        if self.kind == "cuda_allocated":
            torch.cuda.synchronize()
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
            self.baseline_bytes = _cuda(torch.cuda.memory_allocated)
        else:
            _return_free_memory()
            self.note = _reset_highest_resident()
            self.baseline_bytes = resident_bytes()
        self._running = True
        self._read()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.kind == "cuda_allocated":
            torch.cuda.synchronize()
        self._read()
        self._running = False

    def _read(self) -> None:
        if not self._running:
            return
        if self.kind == "cuda_allocated":
            self._peak_bytes = _cuda(torch.cuda.max_memory_allocated)
            self._reserved_peak_bytes = _cuda(torch.cuda.max_memory_reserved)
        else:
            self._peak_bytes = max(_highest_resident_bytes(), self.baseline_bytes)


def current_peak_bytes(device: torch.device | str | None = None) -> int:
    """The highest since a `PeakMemory` of this device was last entered, read from anywhere: for those who only watch."""
    return _cuda(torch.cuda.max_memory_allocated) if type_of(device) == "cuda" else _highest_resident_bytes()


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state, each storage counted once."""
    return _storage_bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones counted once; of weights on a grid, those of codes and scales."""
    return _storage_bytes([*model.parameters(), *model.buffers()])


def available_bytes(device: torch.device | str | None = None) -> int:
    """The most memory that this process can hold on a device: all of a CUDA device's; elsewhere what it has, and what the
    kernel can give it, within the limit of its container.

    Args:
        device: where there is one, the accelerator of this process when None.
    """
    if type_of(device) == "cuda":
        return torch.cuda.mem_get_info()[1]
    limits = [resident_bytes() + _free_bytes()]
    for file in _CONTAINER_LIMITS:
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def device_name(device: torch.device | str | None = None) -> str:
    """A device by name, the one that torch trains on here when None: "NVIDIA H100 80GB HBM3", "Intel Xeon, 2 cores"."""
    kind = type_of(device)
    if kind == "cuda":
        count = torch.cuda.device_count()
        return torch.cuda.get_device_name() + (f" x {count}" if count > 1 else "")
    if kind == "mps":
        return f"Apple {platform.machine()} GPU"
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} core{'s' if threads > 1 else ''}"


def type_of(device: torch.device | str | None = None) -> str:
    """The type of a device, of the one that torch trains on here when None: "cuda", "mps", "cpu"."""
    found = torch.accelerator.current_accelerator(check_available=True) if device is None else torch.device(device)
    return "cpu" if found is None else found.type


def stored_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors whose memory a tensor is in: itself, or those that it wraps, such as the codes of a weight on a grid.

    A sharded tensor counts as itself, with the bytes of the whole.
    """
    if not is_traceable_wrapper_subclass(tensor) or _is_sharded(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # torch's protocol for wrappers
    return [inner for name in names for inner in stored_tensors(getattr(tensor, name))]


def _is_sharded(tensor: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = [stored.untyped_storage() for tensor in tensors for stored in stored_tensors(tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _cuda(read: Callable[[int], int]) -> int:
    return sum(read(device) for device in range(torch.cuda.device_count()))


def _return_free_memory() -> None:
    """Give back what malloc and the pool keep of freed memory: it would count as held, and be used again unseen."""
    gc.collect()
    trim_pool()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)


def _reset_highest_resident() -> str | None:
    try:
        _CLEAR.write_text(_RESET_HIGHEST)
    except OSError:
        return "the highest resident memory cannot be set back here: the peak is that of the whole process so far"
    return None


def resident_bytes() -> int:
    """What this process holds in memory now; where that is not known, the most that it ever held."""
    if _STATUS.exists():
        return _status_bytes("VmRSS")
    return _highest_resident_bytes()


def _highest_resident_bytes() -> int:
    if _STATUS.exists():
        return _status_bytes("VmHWM")
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024  # macOS counts bytes, others KiB


def _free_bytes() -> int:
    known = _field_bytes(_MEMORY, "MemAvailable") if _MEMORY.exists() else None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known is None else known


def _status_bytes(key: str) -> int:
    found = _field_bytes(_STATUS, key)
    if found is None:
        raise OSError(f"{_STATUS} has no {key}")
    return found


def _field_bytes(file: Path, key: str) -> int | None:
    """A line `key:  123 kB` of a file in /proc."""
    for line in file.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1]
                return " ".join(name.replace("(R)", "").replace("(TM)", "").split())
    return platform.processor() or platform.machine()
