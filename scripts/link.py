#!/usr/bin/env python
"""Measures what gradient accumulation buys where replicas of a model are limited by the link between them.

    sudo python scripts/link.py --output benchmarks/results/xeon-2-cores/link.json

The paper (arXiv 2507.07101) accumulates gradients only where many replicas share a slow link. Here two processes train
replicas of one model by DistributedDataParallel (gloo, batch 1, bfloat16, Adafactor without gradient release), with 1, 2, 4
and 16 microbatches a step, each in a network namespace of its own. A pair of virtual interfaces joins the two, and a token
bucket (`tc qdisc ... tbf`) at both ends holds it to a speed; how fast it then is, is measured too. For comparison: the same
model sharded over both by FSDP2, gradients released, which cannot accumulate.

Bytes are what the interface has counted, in both directions. Accumulation also saves updates of the optimizer: what it buys
on the link that is not slowed down is that. Needs root, and the commands ip and tc (package iproute2).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
# 11.5 million weights: 23 MB of gradients, which 100 Mbit/s move in two seconds and one core makes in a fifth of one.
SHAPE = {
    "model_type": "llama", "hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096, "tie_word_embeddings": True,
}  # fmt: skip
# DDP arranges its buckets anew after the first.
WARM_UP_STEPS, LEAST_STEPS = 2, 4
PROBE_BYTES = 8 * 2**20
_ANSWER = "link: "


# The process that slows the link


@contextmanager
def link() -> Iterator[None]:
    """Two network namespaces, joined by a pair of interfaces."""
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
    """Hold both ends to a speed in Mbit/s; UNLIMITED lets them go."""
    for name in NAMESPACES:
        subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", INTERFACE, "root"], check=False, capture_output=True)
        if megabits != UNLIMITED:
            bucket = max(megabits * 250, 128 * 1024)  # bytes of 2 ms, and two of the packets that TCP hands down
            call(
                *("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "tbf"),
                *("rate", f"{megabits}mbit", "burst", str(bucket), "latency", "200ms"),
            )


def call(*command: str) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr.strip()}")


def start(rank: int, folder: Path, chosen: argparse.Namespace) -> subprocess.Popen[str]:
    """A worker in its namespace, which takes a case on each line of its input."""
    environment = {
        **os.environ,
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"},
        **{"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": INTERFACE},
    }
    command = ["ip", "netns", "exec", NAMESPACES[rank], sys.executable, __file__, "--worker", str(folder)]
    options = ["--model", chosen.model, "--tokens", str(chosen.tokens)]
    return subprocess.Popen(
        [*command, *options], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(workers: list[subprocess.Popen[str]], case: dict[str, Any]) -> dict[str, Any]:
    """Have the workers measure a case; what rank 0 answers."""
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
    sys.exit("A worker has ended before its time; what it said stands above.")


# The two that train over it


def work(folder: Path, chosen: argparse.Namespace) -> None:
    """Measure each case that comes on the input."""
    import torch.distributed
    from accelerate import PartialState

    state = PartialState(cpu=True)
    torch.set_num_threads(1)
    if state.is_main_process:
        make_model(chosen.model, folder)
    torch.distributed.barrier()
    for line in sys.stdin:
        case = json.loads(line)
        answer = probe() if case.get("probe") else train(folder, chosen.tokens, **case)
        print(f"{_ANSWER}{json.dumps(answer)}", flush=True)
    state.destroy_process_group()


def make_model(name: str, folder: Path) -> None:
    """Leave a model of random weights in a folder."""
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
    """How fast the link is, by what one rank sends the other."""
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
    """What the interface has received and sent."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == INTERFACE:
            fields = counts.split()
            return int(fields[0]) + int(fields[8])
    raise FileNotFoundError(INTERFACE)


def train(folder: Path, tokens: int, *, microbatches: int, sharded: bool, seconds: float) -> dict[str, Any]:
    """Train for some seconds after the first steps; what a step has cost."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from sbft.models.load import load_model
    from sbft.training.arguments import SmallBatchTrainingArguments
    from sbft.training.trainer import SmallBatchTrainer

    class Clock(TrainerCallback):
        """Ends training when rank 0 says that the time is over, and counts bytes from the end of the first steps on."""

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
    """A batch of rows that are all of one length."""
    import torch

    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


# What came of it


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
    parser.add_argument("--microbatches", default="1,2,4,16", help="a step, the first of them 1")
    parser.add_argument("--model", default="small", help="small (11.5 million weights), or random:NAME")
    parser.add_argument("--tokens", type=int, default=128, help="an example")
    parser.add_argument("--seconds", type=float, default=6, help="of each case, and at least 4 steps")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if chosen.worker is not None:
        work(chosen.worker, chosen)
        return
    if os.geteuid() != 0:
        sys.exit("Only root may make network namespaces: type sudo in front of the command.")
    speeds = [int(word) for word in chosen.speeds.split(",")]
    counts = [int(word) for word in chosen.microbatches.split(",")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary, link():
        workers = [start(rank, Path(temporary) / "model", chosen) for rank in range(RANKS)]
        try:
            for speed in speeds:
                slow_down(speed)
                measured = ask(workers, {"probe": True})
                for count, sharded in [*((count, False) for count in counts), (1, True)]:
                    case = {"microbatches": count, "sharded": sharded, "seconds": chosen.seconds}
                    found = ask(workers, case)
                    what = "sharded, released" if sharded else "replicas"
                    row = {"mbit_per_s": speed, **measured, "what": what, "microbatches": count, **found}
                    one = next((other for other in rows if other["mbit_per_s"] == speed), row)
                    row["of_one_microbatch"] = row["tokens_per_s"] / one["tokens_per_s"]
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
    if chosen.output is not None:
        from sbft.native.memory import device_name
        from sbft.runs.record import git_commit, versions

        settings = {"model": chosen.model, "tokens": chosen.tokens, "ranks": RANKS, "seconds": chosen.seconds}
        whole = {**settings, "slowed_by": "tc tbf on both ends of a veth pair between two network namespaces",
                 "rows": rows, "device": device_name(), "versions": versions(), "git_commit": git_commit()}  # fmt: skip
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
