#!/usr/bin/env python
"""Kills `sbft train` with signal 9 at random moments, resumes it each time, and compares the result with an undisturbed run.

    python tests/faults/kill.py --times 25 --output benchmarks/results/faults/kill.json

A run saves a checkpoint at every step. Every other kill comes at any moment of a session, from reading the data to the last
line of the record; the others come while files have a temporary name, that is, while a checkpoint or the model is written,
or an old one removed. After each kill, every folder with a checkpoint's name must be complete, `latest` must point at one
of them, and no checkpoint that was complete before may be lost. A run must end with the same weights, bit by bit, and the
same measurements, however often it was killed.

With --offload the killed runs stream their layers, with the CPU as the device, and the undisturbed run does not:

    python tests/faults/kill.py --times 25 --offload --output benchmarks/results/faults/kill_offload.json
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tiny_run import end_of, same_bits, start, train, write_recipe, write_result

from sbft.training.checkpointing.checkpoints import damage, sound_checkpoint
from sbft.training.offload import link
from sbft.training.offload.stand_in import StandIn

_POLL_S = 0.0005


def newest(out: Path) -> int:
    """Step of the newest intact checkpoint; 0 if there is none."""
    found, _ = sound_checkpoint(out)
    return 0 if found is None else int(found.name.rpartition("-")[2])


def broken(out: Path, before: int) -> str | None:
    """What a kill has damaged in the folder of a run whose newest checkpoint was that of step `before`."""
    for checkpoint in out.glob("checkpoint-*"):
        if reason := damage(checkpoint):
            return f"{checkpoint.name}: {reason}"
    latest = out / "latest"
    if latest.is_symlink() and damage(latest.resolve()) is not None:
        return f"latest points at {os.readlink(latest)}"
    return f"checkpoint-{before} is lost" if newest(out) < before else None


def temporary_names(out: Path) -> dict[str, int]:
    """Files under temporary names, each with its inode: a file of the same name may be another one."""
    return {path.name: path.stat().st_ino for path in (out / "incomplete").glob("*")}


def moment(out: Path, before: dict[str, int], measured: bool) -> str:
    """What the process was doing when it was killed, judged by the files it left.

    Args:
        out: folder of the run.
        before: files that an earlier session had left under temporary names.
        measured: whether the model was already there.
    """
    left = temporary_names(out)
    if left and left == before:
        return "while it read data and loaded"
    for name in sorted(left):
        if name.endswith(".old"):
            return f"while {name.removesuffix('.old')} was removed"
        return f"while {'the model' if name == 'model' else name} was written"
    if not (out / "run.json").exists():
        return "before anything was written"
    if (out / "model.safetensors").exists() and not measured:
        return "after the model was written"
    return "between writes" if newest(out) else "before the first checkpoint"


def wait_and_kill(process: int, out: Path, delay_s: float, writes: int) -> bool:
    """Kill the process after `delay_s` or, unless `writes` is 0, during the write of that number; False if the process had
    already ended by itself.
    """
    until = time.monotonic() + delay_s if not writes else float("inf")
    seen, there = 0, False
    while time.monotonic() < until:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        if writes:
            was, there = there, any((out / "incomplete").glob("*"))
            seen += there and not was
            if seen == writes:
                time.sleep(delay_s)
                break
        time.sleep(_POLL_S)
    if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
        return False
    os.kill(process, signal.SIGKILL)
    return True


def flag_for(out: Path) -> list[str]:
    """The flag to start with: resume if there is a checkpoint, else overwrite what there is."""
    return ["--resume"] if newest(out) else ["--overwrite"] if out.exists() else []


def main() -> None:
    """Kill, resume, compare; exit code 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=25, help="kills")
    parser.add_argument("--steps", type=int, default=16, help="of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--offload", action="store_true", help="stream the layers of the runs that are killed")
    parser.add_argument("--output", type=Path, help="JSON file")
    chosen = parser.parse_args()
    streaming = ["--offload"] if chosen.offload else []
    link.link_to = lambda device: StandIn()  # runs in forks of this process use it in place of a GPU
    chance = random.Random(chosen.seed)
    kills: list[dict[str, Any]] = []
    runs: list[bool] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe, whole, log = write_recipe(folder, chosen.steps), folder / "whole", folder / "log"
        durations = []
        for _ in range(2):  # the first compiles what is not yet in the cache
            begin = time.monotonic()
            shutil.rmtree(whole, ignore_errors=True)
            if end_of(start(log, lambda: train(recipe, whole))):
                sys.exit(f"The undisturbed run failed:\n{log.read_text()}")
            durations.append(time.monotonic() - begin)
        session_s = durations[-1]
        print(f"An undisturbed run of {chosen.steps} steps takes {session_s:.1f} s.")
        while True:
            out = folder / f"run-{len(runs)}"
            while True:
                before, flags, left = newest(out), [*streaming, *flag_for(out)], temporary_names(out)
                had_model = (out / "model.safetensors").exists()
                process = start(log, lambda out=out, flags=flags: train(recipe, out, *flags))  # type: ignore[misc]
                last = len(kills) >= chosen.times
                writes = 0 if len(kills) % 2 == 0 else chance.randint(1, 6)
                delay_s = chance.uniform(0, 0.02 if writes else session_s)
                if last or not wait_and_kill(process, out, delay_s, writes):
                    if code := end_of(process):
                        sys.exit(f"A run that was not killed ended with exit code {code}:\n{log.read_text()}")
                    break
                end_of(process)
                was_doing = moment(out, left, had_model)
                kill = {"run": len(runs), "moment": was_doing, "newest": newest(out), "broken": broken(out, before)}
                kills.append(kill)
                print(
                    f"{len(kills)} of {chosen.times}: {was_doing}; newest checkpoint {kill['newest']} of "
                    f"{chosen.steps}{'; BROKEN: ' + str(kill['broken']) if kill['broken'] else ''}",
                    flush=True,
                )
            runs.append(same_bits(out, whole))
            print(
                f"Run {len(runs)} has ended {'with the same bits' if runs[-1] else 'with OTHER weights'}.", flush=True
            )
            shutil.rmtree(out)
            if len(kills) >= chosen.times:
                break
    survived = sum(runs[kill["run"]] and kill["broken"] is None for kill in kills)
    print(f"{survived} of {len(kills)} survived, in {len(runs)} runs.")
    result = {"times": len(kills), "survived": survived, "steps": chosen.steps, "seed": chosen.seed, "runs": len(runs),
              **({"offload": "layers"} if chosen.offload else {}),
              "took_s": round(time.monotonic() - began, 1), "kills": kills}  # fmt: skip
    write_result(chosen.output, result)
    sys.exit(survived < len(kills))


if __name__ == "__main__":
    main()
