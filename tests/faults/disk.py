#!/usr/bin/env python
"""Runs `sbft train` on a disk that fills up or becomes read-only during a save, then resumes it once there is room again.

    sudo python tests/faults/disk.py --output benchmarks/results/faults/disk.json

The disk is a tmpfs, which only root may mount. It has ten sizes, so small that it fills up in the first checkpoint, the
second, and so on; and once it is remounted read-only between two writes. Each time the command must end with exit code 2
and a sentence that names the folder and the free space. The checkpoints that were complete must still be so, and the
resumed run must end with the same weights, bit by bit, as an undisturbed run. Finally `sbft export` writes the trained
model to a disk with room for half of it: it must print the same sentence and leave nothing there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tiny_run import command, end_of, same_bits, same_weights, start, train, write_recipe, write_result

from sbft.training.checkpointing.checkpoints import damage, size_bytes, sound_checkpoint

STEPS = 6


def mount(folder: Path, *options: str) -> None:
    """Mount a tmpfs, or remount it with other options."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], check=True)


def read_only_soon(disk: Path, out: Path, process: int) -> None:
    """Remount the disk read-only once it holds a checkpoint; this works only while no file is open for writing."""
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if (out / "latest").exists():
            tried = subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True)
            if tried.returncode == 0:
                return
        time.sleep(0.001)


def case(name: str, folder: Path, recipe: Path, whole: Path, size: int | None) -> dict[str, Any]:
    """One disk: train until a write fails, make room, resume, compare."""
    disk, log = folder / "disk", folder / "log"
    out = disk / "out"
    disk.mkdir(exist_ok=True)
    mount(disk, f"size={size or '1g'}")
    try:
        process = start(log, lambda: train(recipe, out))
        if size is None:
            read_only_soon(disk, out, process)
        code = end_of(process)
        said = [line for line in log.read_text().splitlines() if line.startswith("Error: ")]
        found, damaged = sound_checkpoint(out)
        latest = out / "latest"
        intact = not damaged and (not latest.is_symlink() or damage(latest.resolve()) is None)
        clear = code == 2 and len(said) == 1 and str(out) in said[0] and " are free there" in said[0]
        mount(disk, "remount", "rw", "size=1g")
        flags = ["--resume"] if found else ["--overwrite"] if out.exists() else []
        resumed = end_of(start(log, lambda: train(recipe, out, *flags))) == 0 and same_bits(out, whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return {"case": name, "exit_code": code, "said": said, "newest": found and found.name,
            "survived": clear and intact and resumed}  # fmt: skip


def tell(case: dict[str, Any]) -> None:
    """Print a line about one case."""
    print(f"{case['case']}: {'survived' if case['survived'] else 'NOT SURVIVED'}: {case['said']}", flush=True)


def export_case(folder: Path, trained: Path) -> dict[str, Any]:
    """Export to a disk with room for half the model, then to one with room for all of it."""
    disk, log = folder / "disk", folder / "log"
    to = disk / "exported"
    mount(disk, f"size={(trained / 'model.safetensors').stat().st_size // 2}")
    try:
        code = end_of(start(log, lambda: command("export", str(trained), "--to", str(to))))
        said = [line for line in log.read_text().splitlines() if line.startswith("Error: ")]
        clear = code == 2 and len(said) == 1 and str(to) in said[0] and " are needed" in said[0]
        clean = not any(disk.iterdir())
        mount(disk, "remount", "size=1g")
        again = end_of(start(log, lambda: command("export", str(trained), "--to", str(to)))) == 0
        same = again and same_weights(to, trained)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return {"case": "export", "exit_code": code, "said": said, "newest": None, "survived": clear and clean and same}


def main() -> None:
    """Run all cases; exit code 1 if one was not survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=10, help="of disks that fill up")
    parser.add_argument("--output", type=Path, help="JSON file")
    chosen = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("Only root may mount a disk of a given size: type sudo in front of the command.")
    cases = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe, whole = write_recipe(folder, STEPS), folder / "whole"
        if end_of(start(folder / "log", lambda: train(recipe, whole))):
            sys.exit(f"The undisturbed run failed:\n{(folder / 'log').read_text()}")
        one = size_bytes(whole / f"checkpoint-{STEPS}")
        # Two checkpoints are kept while a third is written: sizes from a fiftieth of one to just below three.
        sizes = [int(one * (0.02 + 2.9 * part / max(chosen.sizes - 1, 1))) for part in range(chosen.sizes)]
        for size in [*sizes, None]:
            name = "read-only" if size is None else f"full at {size / one:.2f} checkpoints"
            cases.append(case(name, folder, recipe, whole, size))
            tell(cases[-1])
        cases.append(export_case(folder, whole))
        tell(cases[-1])
    survived = sum(one["survived"] for one in cases)
    print(f"{survived} of {len(cases)} survived.")
    write_result(chosen.output, {"times": len(cases), "survived": survived, "cases": cases})
    sys.exit(survived < len(cases))


if __name__ == "__main__":
    main()
