#!/usr/bin/env python
"""Kills one of two ranks of a sharded run with signal 9, waits for the other, resumes, and compares with an undisturbed run.

    python tests/faults/rank.py --times 2 --steps 8 --output benchmarks/results/faults/rank.json

The ranks are started by `--num-processes` or by torchrun. Rank 1 or rank 0 is killed at a random moment after the checkpoint
of a random step; every step saves one. Each time all processes must end within a minute, the output must name rank and
signal, and no folder with a checkpoint's name may be damaged. Then the run is resumed in two processes, which must end with
the same weights, bit by bit, and the same measurements. It is resumed so again after a bit was flipped in its newest
checkpoint, which both ranks must skip. A model in float32 without dropout is also resumed in one process, which must reach
the same loss.

Unless torchrun starts them, all processes are forks of this one, which has already imported everything.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_run import ROOT, command, end_of, same_bits, start, train, write_recipe, write_result

import sbft.cli.shared.launch
from sbft.training.checkpointing.checkpoints import PREFIX, damage, newest_first

RANKS = 2
ALLOWED_S = 60
# Gradients summed over two ranks in float32 are rounded differently; a larger difference in the loss is not rounding.
LOSS_TOLERANCE = 1e-4
_POLL_S = 0.001
_PIDS = "pid-of-rank-"


class Fork:
    """The part of `subprocess.Popen` that `sbft.cli.shared.launch` uses, for a rank that is a fork of this process."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(environment)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's handler is not meant for its children
            code = 1
            try:
                code = rank(*arguments[1:])
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended the process; None while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        """Wait until the process has ended; returns its exit code."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(_POLL_S)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        """Send SIGTERM if the process still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL if the process still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def rank(*arguments: str) -> int:
    """Run one rank of `sbft train`, which writes down its process id; returns its exit code."""
    (Path(os.environ["RANK_PIDS"]) / f"{_PIDS}{os.environ['RANK']}").write_text(str(os.getpid()))
    return command("train", *arguments)


def by_sbft(recipe: Path, out: Path, *flags: str) -> int:
    """Run `sbft train --num-processes 2`."""
    sbft.cli.shared.launch.start_rank = Fork  # type: ignore[assignment, misc]
    return train(recipe, out, *flags, "--num-processes", str(RANKS))


def by_torchrun(recipe: Path, out: Path, *flags: str) -> int:
    """Run `torchrun --standalone --nproc-per-node 2 -m sbft train`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    ranks = ["-m", "sbft", "train", str(recipe), "--output-dir", str(out), *flags]
    return subprocess.run([*torchrun, *ranks], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode


def rank_pids(folder: Path, launcher: str) -> dict[int, int]:
    """The process id of each rank: from the file it wrote or, under torchrun, found by its environment variables."""
    if launcher != "torchrun":
        return {number: int((folder / f"{_PIDS}{number}").read_text()) for number in range(RANKS)}
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(one.split("=", 1) for one in (process / "environ").read_text().split("\0") if "=" in one)
        except OSError:
            continue  # it has ended, or belongs to another user
        if variables.get("RANK_PIDS") == str(folder) and "RANK" in variables:
            found[int(variables["RANK"])] = int(process.name)
    return found


LAUNCHERS: dict[str, Callable[..., int]] = {"--num-processes": by_sbft, "torchrun": by_torchrun}
SHARDED = ("--set", f"distributed.fsdp_size={RANKS}")
ALONE = ("--set", f"training.per_device_train_batch_size={RANKS}")


def runs_still(process: int) -> bool:
    """Whether a process with this id exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_checkpoint(out: Path, step: int, process: int, log: Path) -> None:
    """Wait until the checkpoint of a step, or a later one, has been saved."""
    while not any(int(found.name.removeprefix(PREFIX)) >= step for found in newest_first(out)):
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            sys.exit(f"A run ended before its checkpoint of step {step}:\n{log.read_text()}")
        time.sleep(_POLL_S)


def flip_a_byte(checkpoint: Path, chance: random.Random) -> str:
    """Flip one bit in one file of a checkpoint; returns the file's name."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != "complete.json"]
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return file.name


def finished(log: Path, work: Callable[[], int]) -> bool:
    """Do an undisturbed run, whose output goes to the log; returns whether it succeeded."""
    return end_of(start(log, work)) == 0


def loss(out: Path) -> float:
    """The measured loss of the finished model."""
    return float(json.loads((out / "run.json").read_text())["metrics"]["loss"])


def trial(
    folder: Path,
    launcher: str,
    killed: int,
    recipe: Path,
    whole: Path,
    steps: int,
    step_s: float,
    chance: random.Random,
) -> dict[str, Any]:
    """Kill a rank once, and resume the run in three ways."""
    out, log = folder / "out", folder / "log"
    for old in (out, *folder.glob(f"{_PIDS}*")):
        shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
    process = start(log, lambda: LAUNCHERS[launcher](recipe, out, *SHARDED))
    wait_for_checkpoint(out, chance.randrange(1, steps), process, log)
    ranks = rank_pids(folder, launcher)
    time.sleep(chance.uniform(0, step_s))
    began = time.monotonic()
    os.kill(ranks[killed], signal.SIGKILL)
    code = end_of(process)
    while any(runs_still(number) for number in ranks.values()) and time.monotonic() - began < ALLOWED_S:
        time.sleep(_POLL_S)
    ended_s = time.monotonic() - began
    said = log.read_text()
    left = newest_first(out)
    result: dict[str, Any] = {
        "launcher": launcher,
        "killed": killed,
        "recipe": recipe.parent.name,
        "newest": left[0].name,
        "ended_s": round(ended_s, 1),
        "exit_code": code,
        "named": named(said, launcher, killed),
        "said": [line for line in said.splitlines() if line.startswith("Error: ")],
        "broken": next((f"{one.name}: {reason}" for one in left if (reason := damage(one))), None),
    }
    two, one, flipped = folder / "two", folder / "one", folder / "flipped"
    for copy in (two, one, flipped):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy, symlinks=True)
        (copy / "recipe.yaml").write_text((copy / "recipe.yaml").read_text().replace(str(out), str(copy)))
    resumed = finished(log, lambda: LAUNCHERS[launcher](recipe, two, *SHARDED, "--resume"))
    result["same_bits"] = resumed and same_bits(two, whole)
    damaged = newest_first(flipped)
    result["flipped"] = None
    if len(damaged) > 1:
        result["flipped"] = f"{damaged[0].name}/{flip_a_byte(damaged[0], chance)}"
        resumed = finished(log, lambda: LAUNCHERS[launcher](recipe, flipped, *SHARDED, "--resume"))
        told = " ".join(log.read_text().split())
        passed_over = f"passed over: {damaged[0].name}" in told and f"Going on from {damaged[1]}" in told
        result["same_bits_before_the_flipped"] = resumed and passed_over and same_bits(flipped, whole)
    if recipe.parent.name == "float32":
        resumed = finished(log, lambda: train(recipe, one, *ALONE, "--resume"))
        result["loss_in_one"] = resumed and abs(loss(one) / loss(whole) - 1)
    result["survived"] = (
        ended_s < ALLOWED_S and result["named"] and result["broken"] is None and result["same_bits"]
        and result.get("same_bits_before_the_flipped", True)
        and (recipe.parent.name != "float32" or (resumed and result["loss_in_one"] <= LOSS_TOLERANCE))
    )  # fmt: skip
    return result


def named(said: str, launcher: str, killed: int) -> bool:
    """Whether the output says which rank was ended by a signal."""
    if launcher == "torchrun":
        return (
            re.search(rf"rank +: {killed} .*?exitcode +: -9 .*?Signal 9 \(SIGKILL\)", " ".join(said.split()))
            is not None
        )
    return f"Process {killed} of {RANKS} was ended by signal 9 (SIGKILL)" in said


def main() -> None:
    """Kill, wait, resume, compare; exit code 1 if any check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=4, help="kills of each rank under each launcher")
    parser.add_argument("--steps", type=int, default=16, help="of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="JSON file")
    chosen = parser.parse_args()
    chance = random.Random(chosen.seed)
    began = time.monotonic()
    trials: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["RANK_PIDS"] = str(folder)
        log = folder / "log"
        recipes = []
        for name, kind, changes in (
            ("bfloat16", "gpt2", {}),  # has dropout and stochastic rounding
            ("float32", "qwen3", {"dtype": "float32", "optimizer": {"stochastic_rounding": False}}),
        ):
            (folder / name).mkdir()
            recipe = write_recipe(folder / name, chosen.steps, kind, **changes)
            whole = folder / name / "whole"
            process = start(log, lambda recipe=recipe, whole=whole: by_sbft(recipe, whole, *SHARDED))  # type: ignore[misc]
            wait_for_checkpoint(whole, 1, process, log)
            begin = time.monotonic()
            wait_for_checkpoint(whole, chosen.steps, process, log)
            step_s = (time.monotonic() - begin) / (chosen.steps - 1)
            if end_of(process):
                sys.exit(f"The undisturbed run failed:\n{log.read_text()}")
            print(f"{name}: a step takes {step_s:.2f} s, its checkpoint included.", flush=True)
            recipes.append((recipe, whole, step_s))
        for number in range(chosen.times * len(LAUNCHERS) * RANKS):
            launcher = list(LAUNCHERS)[number % 2]
            killed = 1 - number // 2 % 2
            recipe, whole, step_s = recipes[(number + number // 2 + number // 4) % 2]
            trials.append(trial(folder, launcher, killed, recipe, whole, chosen.steps, step_s, chance))
            print(f"{number + 1}: {json.dumps(trials[-1])}", flush=True)
    survived = sum(bool(one["survived"]) for one in trials)
    slowest = max(one["ended_s"] for one in trials)
    print(f"{survived} of {len(trials)} survived; all processes had ended after at most {slowest} s.")
    result = {"times": len(trials), "survived": survived, "slowest_end_s": slowest, "steps": chosen.steps,
              "seed": chosen.seed, "took_s": round(time.monotonic() - began, 1), "trials": trials}  # fmt: skip
    write_result(chosen.output, result)
    sys.exit(survived < len(trials))


if __name__ == "__main__":
    main()
