"""Times a training step on a CPU, alone and beside a busy process, for several ways in which OpenMP's threads wait.

    python benchmarks/busy_machine.py --json busy_machine.json

Each way has a process that keeps its model loaded and trains on request while all others sleep. So the ways alternate on
the same machine within minutes. The busy process computes in Python, on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

WAYS: dict[str, dict[str, str]] = {
    "sbft": {},
    "libgomp as it is": {"SBFT_ADAPTIVE_SPIN": "0"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
LIBGOMP = "libgomp as it is"
CONDITIONS = ("alone", "beside one busy process")
_SET = ("OMP_", "GOMP_", "KMP_", "SBFT_ADAPTIVE_SPIN")


def main() -> None:
    arguments = parse()
    if arguments.child:
        train(arguments)
        return
    children = {way: Child.start(arguments, WAYS[way]) for way in arguments.ways}
    seconds: dict[str, dict[str, list[dict[str, float]]]] = {
        way: {condition: [] for condition in CONDITIONS} for way in children
    }
    try:
        for child in children.values():
            child.steps(arguments.warm_up)
        for _ in range(arguments.rounds):
            for condition in CONDITIONS:
                with busy(condition != CONDITIONS[0]):
                    for way, child in children.items():
                        seconds[way][condition] += child.steps(arguments.steps)
    finally:
        for child in children.values():
            child.end()
    rows = [row(way, steps, seconds) for way, steps in seconds.items()]
    record = {**facts(arguments), "steps": seconds, "rows": rows}
    show(record)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="the NAME of a random:NAME")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of every example")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=10, help="steps of each way before the next way's turn")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


@contextmanager
def busy(another: bool) -> Iterator[None]:
    """A context in which another process computes continuously, if `another`."""
    if not another:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@dataclass
class Child:
    """A process that trains the requested number of steps, then waits."""

    process: subprocess.Popen[str]
    requests: IO[str]
    answers: IO[str]

    @classmethod
    def start(cls, arguments: argparse.Namespace, environment: dict[str, str]) -> Child:
        """Starts the process, with the environment's settings of OpenMP replaced by these."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_SET)}
        command = [sys.executable, __file__, "--child", "--model", arguments.model, "--tokens", str(arguments.tokens)]
        process = subprocess.Popen(
            command, env={**kept, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None and process.stdout is not None
        return cls(process, process.stdin, process.stdout)

    def steps(self, count: int) -> list[dict[str, float]]:
        """For each step: wall time, processor time, involuntary switches, and how many cores other processes used."""
        busy_before_s, start = cores_busy_s(), time.perf_counter()
        steps = self._steps(count)
        others_s = cores_busy_s() - busy_before_s - sum(step["processor_s"] for step in steps)
        return [{**step, "others_cores": others_s / (time.perf_counter() - start)} for step in steps]

    def _steps(self, count: int) -> list[dict[str, float]]:
        self.requests.write(f"{count}\n")
        self.requests.flush()
        for line in self.answers:
            if line.startswith("["):
                return list(json.loads(line))
        raise SystemExit(f"A training process ended: {self.process.wait()}")

    def end(self) -> None:
        """Ends training at its next step, and the process."""
        self.requests.close()
        self.process.wait()


def cores_busy_s() -> float:
    """Seconds that the cores of this machine have been busy."""
    from sbft.native.openmp import look

    now = look()
    if now is None:
        raise SystemExit("This kernel does not report the use of the cores.")
    return now.busy_s


# In a process that trains


def train(arguments: argparse.Namespace) -> None:
    import torch
    from transformers import TrainerCallback, set_seed

    from sbft.models.load import load_model
    from sbft.native.memory_pool import use_pool
    from sbft.native.onednn_products import keep_few_products
    from sbft.training.arguments import SmallBatchTrainingArguments
    from sbft.training.trainer import SmallBatchTrainer

    class StepsOnRequest(TrainerCallback):
        """Waits before a step until further steps are requested."""

        def __init__(self) -> None:
            self.left = 0
            self.steps: list[dict[str, float]] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.left == 0:
                self.left = int(sys.stdin.readline() or 0)
                control.should_training_stop = self.left == 0
            self.begin = usage()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps.append({name: value - self.begin[name] for name, value in usage().items()})
            self.left = max(self.left - 1, 0)
            if self.left == 0:
                print(json.dumps(self.steps), flush=True)
                self.steps = []

    set_seed(0)
    use_pool()
    keep_few_products()
    model = load_model(f"random:{arguments.model}", dtype=torch.bfloat16)
    row = torch.randint(0, model.config.vocab_size, (arguments.tokens,))
    examples = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}] * 1000
    with tempfile.TemporaryDirectory() as folder:
        args = SmallBatchTrainingArguments(
            output_dir=folder, max_steps=len(examples), learning_rate=1e-6, logging_steps=len(examples) + 1,
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        SmallBatchTrainer(model=model, args=args, train_dataset=examples, callbacks=[StepsOnRequest()]).train()


def usage() -> dict[str, float]:
    """What this process has used so far."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "wall_s": time.perf_counter(),
        "processor_s": used.ru_utime + used.ru_stime,
        "involuntary_switches": float(used.ru_nivcsw),
    }


# Results


def row(way: str, steps: dict[str, list[dict[str, float]]], all_ways: dict[str, Any]) -> dict[str, Any]:
    alone, beside = (statistics.median(step["wall_s"] for step in steps[condition]) for condition in CONDITIONS)
    libgomp = all_ways.get(LIBGOMP)
    return {
        "way": way,
        "alone_s": alone,
        "beside_s": beside,
        "beside_processor_s": statistics.median(step["processor_s"] for step in steps[CONDITIONS[1]]),
        "beside_over_alone": beside / alone,
        "alone_over_today": alone / statistics.median(step["wall_s"] for step in libgomp[CONDITIONS[0]])
        if libgomp
        else None,
    }


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.provenance import provenance
    from sbft.native.compiling import processor

    names = [line.partition(":")[2].strip() for line in processor().splitlines() if line.startswith("model name")]
    return {
        **provenance(),
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "model": arguments.model,
        "tokens": arguments.tokens,
    }


def show(record: dict[str, Any]) -> None:
    """Print the table of benchmarks/README.md."""
    print(
        "| how threads wait | alone, s | beside a busy process, s | its processor time, s | beside / alone | alone / libgomp |"
    )
    print("|---|---|---|---|---|---|")
    for line in record["rows"]:
        ratio = "" if line["alone_over_today"] is None else f"{line['alone_over_today']:.2f}"
        print(
            f"| {line['way']} | {line['alone_s']:.2f} | {line['beside_s']:.2f} | {line['beside_processor_s']:.2f} "
            f"| {line['beside_over_alone']:.2f} | {ratio} |"
        )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
