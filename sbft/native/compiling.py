"""Compiles C++ on first use, with the machine's compiler, into the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sbft.files import cache_dir, replacing


class CompilerMissing(Exception):
    """No usable C++ compiler; the message says what was tried."""


def build(
    source: Path,
    flags: Sequence[str],
    *,
    libraries: Sequence[str] = (),
    facts: Iterable[str] = (),
    folder: Path | None = None,
) -> Path:
    """Compile a file to a shared library unless that was done before, and return the library's path.

    The library's name has a hash of the source, the compiler, the flags and `facts`, so it is never used where it does not fit.

    Args:
        source: a C++ file.
        flags: flags for the compiler, before the source.
        libraries: flags for the linker, after the source.
        facts: anything else that the result depends on, such as the processor.
        folder: folder for built libraries; the user's cache by default. Several processes may build at once.

    Raises:
        CompilerMissing: if no compiler is found or it fails.
    """
    compiler = find_compiler()
    folder = cache_dir() / "kernels" if folder is None else folder
    target = folder / f"{source.stem}-{_fingerprint(source, compiler, [*flags, *libraries], facts)}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(target, shared=True) as part:
        command = [compiler, *flags, str(source), "-o", str(part), *libraries]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise CompilerMissing(f"{compiler} failed: {run.stderr.strip()[:500]}")
    return target


def loaded_or_warned(load: Callable[[], ctypes.CDLL], consequence: str) -> ctypes.CDLL | None:
    """What `load` has built and loaded; None, after a warning, where there is no compiler or the library cannot be loaded.

    Args:
        load: builds and loads a library.
        consequence: what follows where it is missing, for the warning.
    """
    try:
        return load()
    except (CompilerMissing, OSError) as error:
        warnings.warn(
            f"sbft's compiled CPU kernels are not available ({error}), so {consequence}; install g++ (Debian: apt-get install "
            "g++) to have them built",
            stacklevel=3,
        )
        return None


def processor() -> str:
    """Describes the processor as far as -march=native depends on it: different machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def find_compiler() -> str:
    """The name or path of the compiler that `build` runs.

    Raises:
        CompilerMissing: if there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    raise CompilerMissing("no C++ compiler was found: neither $CXX nor g++, clang++ or c++")


def _fingerprint(source: Path, compiler: str, flags: Sequence[str], facts: Iterable[str]) -> str:
    path = Path(shutil.which(compiler) or compiler).resolve()
    parts = [source.read_text(), " ".join(flags), str(path), str(path.stat().st_mtime_ns), *facts]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
