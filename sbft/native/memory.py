"""Measures the peak memory of this process, and the size of its parts. All sizes are in bytes, as ints."""

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
# Of a container, in the second and in the first version of control groups.
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_RESET_HIGHEST = "5"  # proc(5): resets the highest resident size to the current one


class PeakMemory:
    """Measures the most memory that this process held between entering and leaving; a context manager.

    On CUDA it is what torch allocated on all visible devices. Elsewhere it is the resident memory of the process, whose
    highest value is reset on entering (on Linux). If that is not possible, `note` says so. The peak is then that of the
    process's whole life so far, which is never too low. The peak so far can be read before leaving.

    Args:
        device: the device that does the work; None for this process's accelerator, or the CPU without one.

    Attributes:
        baseline_bytes: memory held on entering.
        peak_bytes: the most held since.
        reserved_peak_bytes: on CUDA, the most that torch reserved; else None.
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
        """The most held so far, or before leaving."""
        self._read()
        return self._peak_bytes

    @property
    def reserved_peak_bytes(self) -> int | None:
        """The most that torch reserved on CUDA; None elsewhere."""
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
    """The peak since a `PeakMemory` of this device was last entered; for code that does not have that object."""
    return _cuda(torch.cuda.max_memory_allocated) if type_of(device) == "cuda" else _highest_resident_bytes()


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state, each storage counted once."""
    return _storage_bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones counted once; of weights on a grid, those of codes and scales."""
    return _storage_bytes([*model.parameters(), *model.buffers()])


def available_bytes(device: torch.device | str | None = None) -> int:
    """The most memory that this process can hold on a device.

    On CUDA it is all of the device's memory. Elsewhere it is what the process holds plus what the kernel can still give
    it, within the limit of its container.

    Args:
        device: None for this process's accelerator, or the CPU without one.
    """
    if type_of(device) == "cuda":
        return torch.cuda.mem_get_info()[1]
    limits = [resident_bytes() + _free_bytes()]
    for file in _CONTAINER_LIMITS:
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def device_name(device: torch.device | str | None = None) -> str:
    """The name of a device; None for the one that torch trains on here: "NVIDIA H100 80GB HBM3", "Intel Xeon, 2 cores"."""
    kind = type_of(device)
    if kind == "cuda":
        count = torch.cuda.device_count()
        return torch.cuda.get_device_name() + (f" x {count}" if count > 1 else "")
    if kind == "mps":
        return f"Apple {platform.machine()} GPU"
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} core{'s' if threads > 1 else ''}"


def type_of(device: torch.device | str | None = None) -> str:
    """The type of a device; None for the one that torch trains on here: "cuda", "mps", "cpu"."""
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if accelerator is None else accelerator.type
    return torch.device(device).type


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
    """Return freed memory that malloc and the pool keep: it counts as held, and its reuse would not show."""
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
        return "the highest resident memory cannot be reset here: the peak is that of the whole process so far"
    return None


def resident_bytes() -> int:
    """The memory that this process holds now; if that is unknown, the most that it ever held."""
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
    available = _field_bytes(_MEMORY, "MemAvailable") if _MEMORY.exists() else None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if available is None else available


def _status_bytes(key: str) -> int:
    size = _field_bytes(_STATUS, key)
    if size is None:
        raise OSError(f"{_STATUS} has no {key}")
    return size


def _field_bytes(file: Path, key: str) -> int | None:
    """The bytes in a line `key:  123 kB` of a file in /proc; None if it has no such line."""
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
