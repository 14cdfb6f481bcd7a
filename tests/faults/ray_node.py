"""Runs a suite on a local Ray cluster, kills a node, stops the runner, and compares the records with those without Ray.

    pip install 'ray>=2.60'; python tests/faults/ray_node.py --output benchmarks/results/faults/ray.json

The suite runs twice. The first time is without Ray. The second is on a cluster of two nodes, one of which is killed while it
trains (kill -9 of its raylet and its workers); Ctrl-C stops it during the last run, which is then done without Ray. Every
run must have finished once, with the same bits in its weights and the same figures in its record. Whatever was killed or
stopped must have left no process behind.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster
from tiny_run import ROOT, ROWS, write_result

from sbft.bench.schedule import plan
from sbft.bench.suite import load_suite
from sbft.runs.record import RunRecord
from tests.tiny import save_tiny

PATIENCE_S = 900
# Figures that do not depend on how fast the machine is.
SAME = ("status", "steps", "tokens", "train_loss", "metrics", "data", "saved_bytes", "learning_rate", "evaluated_on")


def write_suite(folder: Path, runs: int) -> Path:
    """Write a suite of short runs, whose paths are relative to the folder."""
    save_tiny(folder / "model")
    for name, rows in (("train", ROWS[:36]), ("validation", ROWS[36:40]), ("test", ROWS[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = {
        "models": ["model"],
        "tasks": {
            "sums": {
                "data": {"train": "train.jsonl", "validation": "validation.jsonl", "eval": "test.jsonl"},
                "evaluation": {"metrics": ["exact_match"], "max_new_tokens": 4, "before": False},
            }
        },
        "methods": {"sbft": {"learning_rates": [1e-2]}},
        "baseline": "sbft",
        "seeds": list(range(runs)),
        "training": {"num_train_epochs": 2},
        "keep_models": True,
    }
    path = folder / "suite.yaml"
    path.write_text(json.dumps(suite))  # JSON is YAML
    return path


class Bench:
    """`sbft bench` in a process of its own, in the suite's folder."""

    def __init__(self, suite: Path, out: str, *options: str) -> None:
        self.log = suite.parent / f"{out}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "sbft", "bench", suite.name, "--output-dir", out, *options]
            self.process = subprocess.Popen(command, cwd=suite.parent, stdout=log, stderr=subprocess.STDOUT)

    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text()

    def end(self, expected: int = 0) -> str:
        """Wait until it has ended; returns what it printed."""
        code = self.process.wait(PATIENCE_S)
        if code != expected:
            sys.exit(f"sbft bench ended with exit code {code}, expected {expected}:\n{self.said()}")
        return self.said()


def wait_for(condition: Callable[[], Any], bench: Bench) -> Any:
    """Wait until the condition is true; returns its value."""
    until = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        if time.monotonic() > until or bench.process.poll() is not None:
            sys.exit(f"What was waited for has not come about:\n{bench.said()}")
        time.sleep(0.05)
    return value


def processes() -> dict[int, tuple[int, str]]:
    """Parent and command line of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(entry.name)] = (parent, (entry / "cmdline").read_text().replace("\0", " "))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def below(ancestor: int) -> dict[int, str]:
    """Command lines of the descendants of a process."""
    everything = processes()
    found: dict[int, str] = {}
    while new := {
        number: line
        for number, (parent, line) in everything.items()
        if number not in found and (parent == ancestor or parent in found)
    }:
        found |= new
    return found


def training_below(ancestor: int) -> dict[int, Path]:
    """Folders of the runs that are training below a process: those that have a record."""
    found = {}
    for number, line in below(ancestor).items():
        words = line.split()
        if "sbft" in words and "--output-dir" in words:
            folder = Path(words[words.index("--output-dir") + 1])
            if (folder / "run.json").exists():
                found[number] = folder
    return found


def run_name(folder: Path) -> str:
    """The name of a run, taken from its folder on a worker."""
    return str(folder).partition("/runs/")[2]


def differences(suite: Path, plain: Path, other: Path) -> list[str]:
    """How the runs of two folders differ; empty if they are the same."""
    found = []
    for one in plan(load_suite(suite), plain):
        here, there = plain / "runs" / one.name, other / "runs" / one.name
        if not (there / "run.json").exists():
            found.append(f"{one.name}: there is none")
            continue
        records = [RunRecord.load(folder) for folder in (here, there)]
        found += [f"{one.name}: {key}" for key in SAME if getattr(records[0], key) != getattr(records[1], key)]
        losses = [[entry["loss"] for entry in record.history if "loss" in entry] for record in records]
        if losses[0] != losses[1]:
            found.append(f"{one.name}: losses")
        if records[1].recipe["output_dir"] != str(Path(other.name) / "runs" / one.name):
            found.append(f"{one.name}: output_dir is {records[1].recipe['output_dir']}")
        names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (here, there)]
        if names[0] != names[1]:
            found.append(f"{one.name}: files {sorted(names[0] ^ names[1])}")
        for name in sorted(names[0] & names[1]):
            alike = name.endswith((".safetensors", "predictions.jsonl"))
            if alike and (here / name).read_bytes() != (there / name).read_bytes():
                found.append(f"{one.name}: {name}")
    return found


def main() -> None:
    """Kill, stop, resume, compare; exit code 1 if anything was lost or run twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of the suite, three at least")
    parser.add_argument("--output", type=Path, help="JSON file")
    chosen = parser.parse_args()
    began = time.monotonic()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        suite = write_suite(folder, chosen.runs)
        said = Bench(suite, "plain", "--jobs", "2").end()
        print(f"Without Ray: {said.count(': done in')} runs, {time.monotonic() - began:.0f} s.", flush=True)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
            raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
            print(f"Two nodes, {time.monotonic() - began:.0f} s.", flush=True)
            on_ray = Bench(suite, "on-ray", "--ray", cluster.address)
            victims = wait_for(lambda: training_below(raylets[0]), on_ray)
            killed = [run_name(path) for path in victims.values()]
            others = [number for number in below(raylets[0]) if number not in victims]
            for number in (raylets[0], *others):
                with suppress(ProcessLookupError):  # the raylet's own helpers end with it
                    os.kill(number, signal.SIGKILL)
            moment = time.monotonic()
            print(f"Killed a node, which trained {', '.join(killed)}, {moment - began:.0f} s.", flush=True)
            # The training process was not killed itself: it must end with its worker.
            wait_for(lambda: not victims.keys() & processes().keys(), on_ray)
            gone_s = time.monotonic() - moment
            wait_for(lambda: "it starts again" in on_ray.said(), on_ray)
            begun_again_s = time.monotonic() - moment
            begun_again = [name for name in killed if f"{name}: its" in on_ray.said()]
            wait_for(lambda: on_ray.said().count(": done in") >= chosen.runs - 1, on_ray)
            trained = wait_for(lambda: training_below(raylets[1]), on_ray)
            print(f"Stop, {time.monotonic() - began:.0f} s.", flush=True)
            on_ray.process.send_signal(signal.SIGINT)
            said = on_ray.end(expected=130)
            left = sorted(trained.keys() & processes().keys())
        finally:
            cluster.shutdown()
        said += Bench(suite, "on-ray").end()
        every = [one.name for one in plan(load_suite(suite), folder / "on-ray")]
        once = sum(said.count(f"{name}: done in") == 1 for name in every)
        differing = differences(suite, folder / "plain", folder / "on-ray")
    result = {
        "runs": len(every),
        "finished_once": once,
        "same": len(every) - len({line.partition(":")[0] for line in differing}),
        "differences": differing,
        "killed_while_training": killed,
        "begun_again": begun_again,
        "its_process_gone_after_s": round(gone_s, 2),
        "begun_again_after_s": round(begun_again_s, 2),
        "stopped_while_training": [run_name(path) for path in trained.values()],
        "processes_left_by_ctrl_c": len(left),
        "took_s": round(time.monotonic() - began, 1),
    }
    print(json.dumps(result, indent=2))
    write_result(chosen.output, result)
    survived = once == len(every) and not differing and begun_again == killed and not left
    sys.exit(not survived)


if __name__ == "__main__":
    main()
