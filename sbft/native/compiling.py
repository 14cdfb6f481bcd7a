"""C++ compiled on first use by the machine's compiler, into the user's cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
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

    Its name holds the source, the compiler's version, the flags and `facts`, so that it is never used where it does not fit.

    Args:
        source: a file of C++.
        flags: for the compiler, before the source.
        libraries: the same for the linker, after it.
        facts: what else the result depends on, such as the processor.
        folder: of built libraries; the user's cache by default. Several processes may build at once.

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


def processor() -> str:
    """What -march=native depends on: a home folder may be shared by unlike machines."""
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
    known = [source.read_text(), " ".join(flags), str(path), str(path.stat().st_mtime_ns), *facts]
    return hashlib.sha256("\0".join(known).encode()).hexdigest()[:16]
