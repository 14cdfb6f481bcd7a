"""What a bug report needs to know about a machine and its packages; never a password or a token."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from sbft import __version__
from sbft.errors import names_secret, without_secrets
from sbft.native.compiling import CompilerMissing, find_compiler
from sbft.native.sizes import gib
from sbft.runs.record import PACKAGES, git_commit

if TYPE_CHECKING:
    import torch

_FURTHER_PACKAGES = (
    "trl", "tokenizers", "safetensors", "huggingface-hub", "triton", "numpy", "pydantic", "typer", "reasoning-gym", "lm-eval",
    "ray",
)  # fmt: skip
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve", "bf16")
"""Flags of /proc/cpuinfo that make matrix products in float32 or bfloat16 fast."""
_PREFIXES = (
    "SBFT_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "MALLOC_", "LD_PRELOAD", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_",
    "PYTORCH_", "TORCH", "TRITON_", "ACCELERATE_", "FSDP_", "BNB_", "TRANSFORMERS_", "TOKENIZERS_",
)  # fmt: skip
_NAMES = {
    "CC", "CXX", "LRU_CACHE_CAPACITY", "LD_LIBRARY_PATH", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE",
    "HF_DATASETS_OFFLINE", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
}  # fmt: skip


def installation() -> dict[str, str]:
    """Facts by name, in the order in which a reader asks for them."""
    facts = {"sbft": f"{__version__}, {_origin()}"}
    facts["python"] = f"{platform.python_version()} ({sys.executable})"
    facts["system"] = platform.platform()
    facts |= {package: _version(package) for package in (*PACKAGES[1:], *_FURTHER_PACKAGES)}
    try:
        import torch
    except (ImportError, OSError) as error:
        facts["device"] = f"unknown, because torch cannot be imported: {error}"
    else:
        facts |= _of_torch(torch.device("cpu"))
    facts["C++ compiler"] = _compiler()
    facts["environment"] = _environment()
    return facts


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _origin() -> str:
    commit = git_commit()
    return f"commit {commit}" if commit else f"in {Path(__file__).parent.parent}"


def _of_torch(cpu: torch.device) -> dict[str, str]:
    import torch

    from sbft.native.memory import device_name, type_of

    facts = {"device": device_name()}
    if type_of() != "cpu":
        facts["CPU"] = device_name(cpu)
    if type_of() == "cuda":
        for number in range(torch.cuda.device_count()):
            facts[f"GPU {number}"] = _gpu(number)
        facts["GPU libraries"] = f"CUDA {torch.version.cuda}, HIP {torch.version.hip}, cuDNN {torch.backends.cudnn.version()}"
    facts["instructions"] = f"{torch.backends.cpu.get_cpu_capability()} is what torch uses; the CPU has {_instructions()}"
    facts["threads"] = _threads()
    facts["memory"] = _memory()
    facts["memory pool"] = _pool()
    facts["kernels, CPU"] = _kernels(cpu)
    if type_of() == "cuda":
        facts["kernels, GPU"] = _kernels(torch.device("cuda"))
    return facts


def _gpu(number: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    return f"{properties.name}, {properties.major}.{properties.minor}, {gib(free, 1)} of {gib(total, 1)} free"


def _instructions() -> str:
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return f"those of {platform.machine()}"
    flags = {
        flag
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith(("flags", "Features"))
        for flag in line.partition(":")[2].split()
    }
    return " ".join(name for name in _INSTRUCTIONS if name in flags) or "none of those that sbft looks for"


def _threads() -> str:
    import torch

    usable = f", of which {len(os.sched_getaffinity(0))} may be used" if hasattr(os, "sched_getaffinity") else ""
    return f"{torch.get_num_threads()} of torch; {os.cpu_count()} cores{usable}"


def _memory() -> str:
    from sbft.native.memory import available_bytes

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{gib(total, 1)}, of which a process can have {gib(available_bytes('cpu'), 1)} now"


def _pool() -> str:
    from sbft.native.memory_pool import SWITCH, pool_available

    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    return "in use where a CPU trains" if pool_available() else "none: it needs Linux and a C++ compiler"


def _kernels(device: torch.device) -> str:
    """The kernels that would update a parameter on this device. They are compiled now if they are not yet."""
    from sbft.optim.kernels import backend_for, cpu, reference

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            backend = backend_for(device)
        except ValueError as error:
            return str(error)
        compiled = cpu.library() is not None if backend is cpu else backend is not reference
    if compiled:
        return "compiled C++" if backend is cpu else f"Triton {_version('triton')}"
    why = "; ".join(str(warning.message) for warning in caught) or f"SBFT_KERNELS={os.environ.get('SBFT_KERNELS')}"
    return f"plain torch ({why})"


def _compiler() -> str:
    try:
        name = find_compiler()
    except CompilerMissing as error:
        return f"none ({error})"
    done = subprocess.run([name, "--version"], capture_output=True, text=True, check=False)
    return f"{shutil.which(name)}: {(done.stdout or done.stderr).partition(chr(10))[0].strip()}"


def _environment() -> str:
    held = {
        name: without_secrets(value)
        for name, value in sorted(os.environ.items())
        if (name in _NAMES or name.startswith(_PREFIXES)) and not names_secret(name)
    }
    return " ".join(f"{name}={value}" for name, value in held.items()) or "nothing set that matters to sbft"
