#!/usr/bin/env python
"""Measures what gradient accumulation gains if the link between replicas of a model limits them.

    sudo python scripts/link.py --output benchmarks/results/xeon-2-cores/link.json

The paper (arXiv 2507.07101) accumulates gradients only where many replicas share a slow link. Here two processes train
replicas of one model with DistributedDataParallel (gloo, batch 1, bfloat16, Adafactor without gradient release), with
1, 2, 4 and 16 microbatches per step. Each is in a network namespace of its own. A pair of virtual interfaces joins the
two, and a token bucket (`tc qdisc ... tbf`) at both ends limits its speed; the resulting speed is measured too. For
comparison, the same model is sharded over both processes by FSDP2 with gradients released, which cannot accumulate.

Bytes are those counted by the interface, in both directions. Accumulation also saves updates of the optimizer; the gain
on the unlimited link is that saving. Requires root, and the commands ip and tc (package iproute2).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
NAMESPACES = [f"sbft-link-{os.getpid()}-{rank}" for rank in range(RANKS)]
INTERFACE = "link0"
ADDRESSES = ["10.203.0.1", "10.203.0.2"]
PORT = "29400"
UNLIMITED = 0
# 11.5 million weights: 23 MB of gradients, sent in two seconds at 100 Mbit/s, and computed in a fifth of one on one core.
SHAPE = {
    "model_type": "llama", "hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096, "tie_word_embeddings": True,
}  # fmt: skip
# DDP rearranges its buckets after the first step.
WARM_UP_STEPS, LEAST_STEPS = 2, 4
PROBE_BYTES = 8 * 2**20
_ANSWER = "link: "


# In the process that slows the link


@contextmanager
def link() -> Iterator[None]:
    """Within, two network namespaces are joined by a pair of interfaces."""
    try:
        for name in NAMESPACES:
            call("ip", "netns", "add", name)
        ends = [f"sl{os.getpid()}-{rank}" for rank in range(RANKS)]
        call("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for end, name, address in zip(ends, NAMESPACES, ADDRESSES, strict=True):
            call("ip", "link", "set", end, "netns", name, "name", INTERFACE)
            call("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for device in (INTERFACE, "lo"):
                call("ip", "-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in NAMESPACES:
            subprocess.run(["ip", "netns", "del", name], check=False)


def slow_down(megabits: int) -> None:
    """Limit both ends to a speed in Mbit/s, or remove the limit (UNLIMITED)."""
    for name in NAMESPACES:
        subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", INTERFACE, "root"], check=False, capture_output=True)
        if megabits != UNLIMITED:
            bucket = max(
                megabits * 250, 128 * 1024
            )  # what is sent in 2 ms; at least two of the packets that TCP hands down
            call(
                *("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "tbf"),
                *("rate", f"{megabits}mbit", "burst", str(bucket), "latency", "200ms"),
            )


def call(*command: str) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr.strip()}")


def start(rank: int, folder: Path, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    """Start a worker in its namespace; it reads a case from each line of its input."""
    environment = {
        **os.environ,
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"},
        **{"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": INTERFACE},
    }
    command = ["ip", "netns", "exec", NAMESPACES[rank], sys.executable, __file__, "--worker", str(folder)]
    options = ["--model", arguments.model, "--tokens", str(arguments.tokens)]
    return subprocess.Popen(
        [*command, *options], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(workers: list[subprocess.Popen[str]], case: dict[str, Any]) -> dict[str, Any]:
    """Have the workers measure a case; returns the answer of rank 0."""
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(case) + "\n")
        worker.stdin.flush()
    answers = [read_answer(worker.stdout) for worker in workers]
    return answers[0]


def read_answer(output: IO[str] | None) -> dict[str, Any]:
    """The next answer on a worker's output."""
    assert output is not None
    for line in output:
        if line.startswith(_ANSWER):
            answer: dict[str, Any] = json.loads(line.removeprefix(_ANSWER))
            return answer
    sys.exit("A worker has ended early; its output is above.")


# In the two processes that train over it


def work(folder: Path, arguments: argparse.Namespace) -> None:
    """Measure each case on the input."""
    import torch.distributed
    from accelerate import PartialState

    state = PartialState(cpu=True)
    torch.set_num_threads(1)
    if state.is_main_process:
        make_model(arguments.model, folder)
    torch.distributed.barrier()
    for line in sys.stdin:
        case = json.loads(line)
        answer = probe() if case.get("probe") else train(folder, arguments.tokens, **case)
        print(f"{_ANSWER}{json.dumps(answer)}", flush=True)
    state.destroy_process_group()


def make_model(name: str, folder: Path) -> None:
    """Save a model with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sbft.models.load import load_model

    if name == "small":
        torch.manual_seed(0)
        settings = dict(SHAPE)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    else:
        model = load_model(name, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def probe() -> dict[str, Any]:
    """Measure the speed of the link, by what one rank sends to the other."""
    import torch

    message = torch.zeros(PROBE_BYTES, dtype=torch.uint8)
    times = []
    for _ in range(3):
        torch.distributed.barrier()
        begin = time.perf_counter()
        torch.distributed.broadcast(message, 0)
        torch.distributed.barrier()
        times.append(time.perf_counter() - begin)
    return {"measured_mbit_per_s": PROBE_BYTES * 8 / median(times) / 1e6}


def bytes_moved() -> int:
    """Bytes that the interface has received and sent."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == INTERFACE:
            fields = counts.split()
            return int(fields[0]) + int(fields[8])
    raise FileNotFoundError(INTERFACE)


def train(folder: Path, tokens: int, *, microbatches: int, sharded: bool, seconds: float) -> dict[str, Any]:
    """Train for some seconds after the first steps; returns the cost of a step."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from sbft.models.load import load_model
    from sbft.training.arguments import SmallBatchTrainingArguments
    from sbft.training.trainer import SmallBatchTrainer

    class Clock(TrainerCallback):
        """Counts bytes after the first steps, and ends training when rank 0 says that the time is up."""

        begun_s, begun_bytes, moved, steps = 0.0, 0, 0, 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARM_UP_STEPS:
                self.begun_s, self.begun_bytes = time.perf_counter(), bytes_moved()
            if state.global_step < WARM_UP_STEPS + LEAST_STEPS:
                return
            over = torch.tensor(time.perf_counter() - self.begun_s >= seconds)
            torch.distributed.broadcast(over, 0)
            if over:
                self.moved, self.steps = bytes_moved() - self.begun_bytes, state.global_step - WARM_UP_STEPS
                control.should_training_stop = True

    arguments = SmallBatchTrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=100_000,
        gradient_accumulation_steps=microbatches,
        gradient_release=sharded,
        use_cpu=True,
        ddp_find_unused_parameters=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = load_model(str(folder), dtype=torch.bfloat16, distributed={"fsdp_size": RANKS} if sharded else None)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, model.config.vocab_size, (64, tokens), generator=generator).tolist()
    clock = Clock()
    trainer = SmallBatchTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
        data_collator=collate,
        callbacks=[clock],
    )
    trainer.train()
    step_s = median(trainer.step_seconds[WARM_UP_STEPS:])
    examples = RANKS * microbatches
    return {
        "steps": clock.steps,
        "step_s": step_s,
        "steps_per_s": 1 / step_s,
        "tokens_per_s": examples * tokens / step_s,
        "bytes_per_step": clock.moved / clock.steps,
        "bytes_per_example": clock.moved / clock.steps / examples,
    }


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """A batch of rows of equal length."""
    import torch

    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


# Results


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown: throughput as a multiple of that with 1 microbatch over the same link."""
    lines = [
        "| link, Mbit/s | measured | what | microbatches | steps/s | tokens/s | of 1 microbatch | MB moved per example |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        limit = "not slowed" if row["mbit_per_s"] == UNLIMITED else f"{row['mbit_per_s']:,}"
        lines.append(
            f"| {limit} | {row['measured_mbit_per_s']:,.0f} | {row['what']} | {row['microbatches']} | "
            f"{row['steps_per_s']:.2f} | {row['tokens_per_s']:,.0f} | {row['of_one_microbatch']:.2f} | "
            f"{row['bytes_per_example'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure all cases, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speeds", default="100,1000,10000,0", help="Mbit/s; 0: not slowed down")
    parser.add_argument(
        "--microbatches", default="1,2,4,16", help="numbers of microbatches per step; the first must be 1"
    )
    parser.add_argument("--model", default="small", help="small (11.5 million weights), or random:NAME")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per example")
    parser.add_argument("--seconds", type=float, default=6, help="seconds per case, with at least 4 steps")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.worker is not None:
        work(arguments.worker, arguments)
        return
    if os.geteuid() != 0:
        sys.exit("Only root may make network namespaces: type sudo in front of the command.")
    speeds = [int(word) for word in arguments.speeds.split(",")]
    counts = [int(word) for word in arguments.microbatches.split(",")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, link():
        workers = [start(rank, Path(temporary) / "model", arguments) for rank in range(RANKS)]
        try:
            for speed in speeds:
                slow_down(speed)
                measured = ask(workers, {"probe": True})
                for count, sharded in [*((count, False) for count in counts), (1, True)]:
                    case = {"microbatches": count, "sharded": sharded, "seconds": arguments.seconds}
                    answer = ask(workers, case)
                    what = "sharded, released" if sharded else "replicas"
                    row = {"mbit_per_s": speed, **measured, "what": what, "microbatches": count, **answer}
                    one_microbatch = next((earlier for earlier in rows if earlier["mbit_per_s"] == speed), row)
                    row["of_one_microbatch"] = row["tokens_per_s"] / one_microbatch["tokens_per_s"]
                    rows.append(row)
                    print(table([row]).splitlines()[-1], flush=True)
        finally:
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.close()
            for worker in workers:
                try:
                    worker.wait(30)
                except subprocess.TimeoutExpired:
                    worker.kill()
                    worker.wait()
    print("\n" + table(rows))
    if arguments.output is not None:
        from sbft.native.memory import device_name
        from sbft.runs.record import git_commit, versions

        settings = {"model": arguments.model, "tokens": arguments.tokens, "ranks": RANKS, "seconds": arguments.seconds}
        whole = {**settings, "slowed_by": "tc tbf on both ends of a veth pair between two network namespaces",
                 "rows": rows, "device": device_name(), "versions": versions(), "git_commit": git_commit(),
                 "command": shlex.join(["python", *sys.argv]),
                 "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}  # fmt: skip
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
