"""Trains tiny models over as many processes as the environment says, two or four; run by test_sharded_training.py.

`torchrun --nproc-per-node 2 -m tests.integration.sharded_worker FOLDER` writes the results of all cases to FOLDER/2.pt.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

from sbft.errors import DiskError, ModelError
from sbft.models.load import load_model
from sbft.optim import SGD
from sbft.optim.sharding import is_sharded, whole
from sbft.training.arguments import ArgumentError, SmallBatchTrainingArguments
from sbft.training.batches.packing_probe import PackedBatches
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import tiny_model
from tests.unit.training.checkpointing.test_saving import SmallFiles

STEPS, BATCH = 4, 4


@dataclass(frozen=True)
class Case:
    """One model and how it is trained; a hidden size of 128 is enough for factored second moments."""

    kind: str
    tied: bool
    vocab: int
    optimizer: str = "adafactor"
    release: bool = True
    adapter: bool = False


CASES = {
    "rows that do not divide": Case("qwen3", False, 513),
    "tied embeddings": Case("llama", True, 512),
    # Not Adafactor: it divides a gradient by its size, and some gradients of this model are nothing but rounding errors.
    "a soft cap": Case("gemma3", True, 512, "sgd"),
    "gradients kept": Case("llama", False, 512, release=False),
}
# Refused on two processes, and on two times two.
UNEVEN = {"tied and uneven": Case("llama", True, 513), "tied and uneven in four": Case("llama", True, 514)}
ADAPTER = {"an adapter": Case("qwen3", False, 512, "sgd", release=False, adapter=True)}
EVERY = {**CASES, **UNEVEN, **ADAPTER}

# The case whose checkpoints are resumed, and the case whose best checkpoint becomes the model.
RESUMED, CHOSEN = "rows that do not divide", "tied embeddings"
# Both have norms of heads, and each rank has some of the heads.
TENSOR_PARALLEL = ["rows that do not divide", "a soft cap"]
SPOILED_STEP = 1
BY_FOUR: dict[str, dict[str, Any]] = {
    "rows and columns": {"case": "rows that do not divide", "tp": 2},
    "rows and columns, tied": {"case": "a soft cap", "tp": 2},
    "rows, twice": {"case": "tied embeddings", "replicas": 2},
}
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
LOSSES = [3.0, 1.0, 2.0, 4.0]


def save_models(folder: Path) -> None:
    for name, case in EVERY.items():
        model = tiny_model(case.kind, tied=case.tied, vocab=case.vocab, hidden=128, dtype=torch.float32)
        model.save_pretrained(folder / name)


def train(
    name: str,
    folder: Path,
    processes: int,
    *,
    out: str = "out",
    resume: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    losses: Sequence[float] = (),
    sharded: bool = True,
    tp: int = 1,
    replicas: int = 1,
    spoiled: bool = False,
    **others: Any,
) -> dict[str, Any]:
    """Train a case; returns its full weights and what the trainer has counted.

    Args:
        name: name of the case.
        folder: folder with the models.
        processes: number of processes over which the model is sharded.
        out: the output folder, in `folder`.
        resume: a checkpoint to resume from.
        callbacks: callbacks of the trainer.
        losses: losses that the evaluations during training return.
        sharded: shard over the processes; if False, each has the whole model, and DistributedDataParallel sums the gradients.
        tp: how many of the processes share every matrix, and have the same examples.
        replicas: number of copies of the model, each sharded over its share of the processes.
        spoiled: whether the loss of one step is NaN, on the last process alone.
        others: further arguments of the trainer.
    """
    case = EVERY[name]
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "learning_rate": 1e-2 if case.optimizer == "adafactor" else 0.1,
        "save_strategy": "no",
        "gradient_release": case.release,
    }
    arguments = SmallBatchTrainingArguments(
        output_dir=str(folder / out),
        per_device_train_batch_size=BATCH // (processes // tp) // others.get("gradient_accumulation_steps", 1),
        use_cpu=True,
        token_optimizer=case.optimizer,
        stochastic_rounding=False,
        cast_weights=False,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        **{**defaults, **others},
    )
    sharding = None
    if processes > 1 and sharded:
        sizes = {"fsdp_size": processes // tp // replicas, "tp_size": tp}
        if replicas > 1:  # older versions of transformers do not have it
            sizes["dp_replicate_size"] = replicas
        sharding = DistributedConfig(**sizes)
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, distributed_config=sharding)
    if case.adapter:
        torch.manual_seed(arguments.process_index)  # the trainer has to make them equal
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model: Any = get_peft_model(model, config)
    # Lengths differ, so that the ranks have different numbers of labels.
    generator = torch.Generator().manual_seed(0)
    lengths = [9 + 3 * (i % 5) for i in range(STEPS * BATCH)]
    rows = [{"input_ids": torch.randint(3, case.vocab, (length,), generator=generator).tolist()} for length in lengths]
    data = Dataset.from_list(rows)
    trainer = SmallBatchTrainer(
        model, arguments, _pad, train_dataset=data, eval_dataset=data if losses else None, callbacks=[*callbacks]
    )
    remaining = iter(losses)

    def evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
        trainer.control.should_evaluate = False
        return {"eval_loss": next(remaining)}

    def spoil(embedding: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        last = arguments.process_index == processes - 1
        return output * torch.nan if spoiled and last and trainer.state.global_step == SPOILED_STEP else output

    model.get_input_embeddings().register_forward_hook(spoil)
    trainer._evaluate = evaluate  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "sharded": sum(is_sharded(parameter) for parameter in model.parameters()),
        "parameters": len(list(model.parameters())),
        "logits_free": trainer._head is not None,
        "tokens": trainer.tokens_seen,
        "skipped": trainer.skipped_steps,
        "hooks": sum(len(one._post_accumulate_grad_hooks or ()) for one in model.parameters() if one.requires_grad),
        "losses": [float(entry["loss"]) for entry in logged],
        "norms": [float(entry["grad_norm"]) for entry in logged],
        "weights": {
            name: whole(parameter).detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        },
    }


def _pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(value: int, fill: int) -> torch.Tensor:
        filled = [row["input_ids"] if value < 0 else [value] * len(row["input_ids"]) for row in rows]
        return torch.tensor([one + [fill] * (longest - len(one)) for one in filled])

    return {"input_ids": padded(-1, 2), "attention_mask": padded(1, 0), "labels": padded(-1, -100)}


def refusal(name: str, folder: Path, processes: int, **sizes: int) -> str:
    """The error for tied embeddings whose rows do not divide by the number of processes."""
    try:
        train(name, folder, processes, **sizes)  # type: ignore[arg-type]
    except ModelError as error:
        return str(error)
    return ""


class Hub:
    """Stands in for the hub's client: puts uploads into a folder, in a subfolder named after the commit message."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create_repo(self, name: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=name)

    def upload_folder(
        self,
        *,
        folder_path: str,
        commit_message: str,
        ignore_patterns: Sequence[str] = (),
        path_in_repo: str = "",
        **_: Any,
    ) -> Future[None]:
        target = self.folder / commit_message / path_in_repo
        shutil.copytree(folder_path, target, ignore=shutil.ignore_patterns(*ignore_patterns), dirs_exist_ok=True)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def pushed(folder: Path, processes: int) -> None:
    """Train and push every checkpoint, to FOLDER/hub."""
    with patch("transformers.trainer.hf_api", lambda: Hub(folder / "hub")):
        train(
            CHOSEN, folder, processes, out="pushed", push_to_hub=True, hub_model_id="someone/model",
            hub_strategy="checkpoint", **SAVING,
        )  # fmt: skip


def full_at_a_push(folder: Path, processes: int) -> None:
    """Train with a push for which the disk has no room, which only the first process notices."""
    no_room = OSError(errno.ENOSPC, "No space left on device")
    try:
        with (
            patch("transformers.trainer.hf_api", lambda: Hub(folder / "hub")),
            patch("sbft.training.checkpointing.sharded.write_shards", side_effect=no_room),
        ):
            train(
                CHOSEN,
                folder,
                processes,
                out="full at a push",
                push_to_hub=True,
                hub_model_id="someone/model",
                **SAVING,
            )
    except DiskError as error:
        (folder / f"full at a push-{torch.distributed.get_rank()}.txt").write_text(str(error))


def refusal_of_release(folder: Path, processes: int) -> str:
    """The error for gradient release with an adapter on a sharded model."""
    try:
        train("an adapter", folder, processes, gradient_release=True)
    except ArgumentError as error:
        return str(error)
    return ""


def refusal_of_a_plan(folder: Path, processes: int) -> str:
    """The error for tensor parallelism of a model that transformers has no plan to cut."""
    tiny_model("gpt2", hidden=128).save_pretrained(folder / f"gpt2 of {os.environ['RANK']}")
    try:
        load_model(
            str(folder / f"gpt2 of {os.environ['RANK']}"), dtype=torch.float32, distributed={"tp_size": processes}
        )
    except ModelError as error:
        return str(error)
    return ""


def packed_on_one(folder: Path, processes: int) -> float:
    """The loss of a step that all processes take part in, after one of them found its batch to be packed."""
    sharding = DistributedConfig(fsdp_size=processes)
    model = AutoModelForCausalLM.from_pretrained(folder / RESUMED, dtype=torch.float32, distributed_config=sharding)
    positions = torch.arange(4).repeat(2) if torch.distributed.get_rank() == 0 else torch.arange(8)
    batch = {"input_ids": torch.arange(8)[None], "position_ids": positions[None]}
    PackedBatches().look(model, batch)
    loss: torch.Tensor = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    return float(loss)


def released_parts(processes: int) -> dict[str, bool]:
    """By how a parameter is cut: whether a step in bfloat16 rounds each part as it rounds the whole."""
    mesh = init_device_mesh("cpu", (2, processes // 2), mesh_dim_names=("fsdp", "tp"))
    cuts: dict[str, tuple[DeviceMesh, list[Any]]] = {
        "rows": (init_device_mesh("cpu", (processes,)), [Shard(0)]),
        "columns": (init_device_mesh("cpu", (processes,)), [Shard(1)]),
        "rows and columns": (mesh, [Shard(0), Shard(1)]),
        "rows of rows": (mesh, [_StridedShard(0, split_factor=processes // 2), Shard(0)]),
        "rows, on each replica": (mesh, [Replicate(), Shard(0)]),
    }
    found = {}
    for name, (over, placements) in cuts.items():
        generator = torch.Generator().manual_seed(0)
        weight, grad = (torch.randn(130, 77, generator=generator).bfloat16() for _ in range(2))
        plain = torch.nn.Parameter(weight.clone())
        cut = torch.nn.Parameter(distribute_tensor(weight, over, placements, src_data_rank=None))
        plain.grad, cut.grad = grad, distribute_tensor(grad, over, placements, src_data_rank=None)
        for parameter in (plain, cut):
            optimizer = SGD([parameter], lr=1e-3, seed=7)
            optimizer.tokens_per_step = 1
            optimizer.step()
        found[name] = not plain.equal(weight) and whole(cut.detach()).equal(plain.detach())
    return found


def in_two(folder: Path) -> dict[str, Any]:
    """Results of every case in two processes, sharded or replicated, and of checkpoints: resumed by as many processes as
    wrote them, or by two where one wrote them; the best one; a full disk.
    """
    processes = 2
    results = {name: train(name, folder, processes) for name in CASES}
    results |= {
        "straight": train(RESUMED, folder, processes, out="several", **SAVING),
        "resumed": train(RESUMED, folder, processes, out="resumed", resume=folder / "several" / "checkpoint-2"),
        "from one": train(RESUMED, folder, processes, out="from one", resume=folder / "one" / "checkpoint-2"),
        "best": train(
            CHOSEN, folder, processes, out="best", losses=LOSSES, save_strategy="steps", save_steps=1, save_total_limit=1,
            eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        ),
    }  # fmt: skip
    for name, options in (
        ("adapter", SAVING),
        ("adapter resumed", {"resume": folder / "adapter" / "checkpoint-2"}),
        ("adapter accumulated", {"gradient_accumulation_steps": 2}),
    ):
        results[name] = train("an adapter", folder, processes, out=name, **options)
        if torch.distributed.get_rank() > 0:
            torch.save(results[name]["weights"], folder / f"{name} of the last rank.pt")
    pushed(folder, processes)
    full_at_a_push(folder, processes)
    results["adapter released"] = refusal_of_release(folder, processes)
    results["packed on one"] = packed_on_one(folder, processes)
    results["no plan"] = refusal_of_a_plan(folder, processes)
    results["replicas"] = train("gradients kept", folder, processes, sharded=False, gradient_accumulation_steps=2)
    results["spoiled"] = train(RESUMED, folder, processes, out="spoiled", spoiled=True, **SAVING)
    for name in [*TENSOR_PARALLEL, "tied and uneven"]:
        results[f"{name}, by tensors"] = train(
            name, folder, processes, out=f"{name} by tensors", tp=processes, **SAVING
        )
        if torch.distributed.get_rank() > 0:
            torch.save(results[f"{name}, by tensors"]["weights"], folder / f"{name} of the last rank.pt")
    full = SmallFiles(3, 10_000) if torch.distributed.get_rank() == processes - 1 else None
    try:
        train(RESUMED, folder, processes, out="full", callbacks=[full] if full is not None else [], **SAVING)
    except DiskError as error:
        (folder / f"full-{torch.distributed.get_rank()}.txt").write_text(str(error))
    finally:
        if full is not None:
            full.lift()
    return results


def in_four(folder: Path) -> dict[str, Any]:
    """Results of a model that is sharded over two times two processes: each pair shares every matrix, or has a replica of
    the model.
    """
    results = {}
    for name, sizes in BY_FOUR.items():
        case, options = sizes["case"], {key: value for key, value in sizes.items() if key != "case"}
        results[name] = train(case, folder, 4, out=name, **options, **SAVING)
        half = folder / name / "checkpoint-2"
        results[f"{name}, resumed"] = train(case, folder, 4, out=f"{name} resumed", resume=half, **options)
    results["from one"] = train(
        RESUMED, folder, 4, out="from one in four", resume=folder / "one" / "checkpoint-2", tp=2
    )
    return results


if __name__ == "__main__":
    target = Path(sys.argv[1])
    from accelerate import PartialState

    state = PartialState(cpu=True)
    number, rank = state.num_processes, state.process_index
    outcomes = in_two(target) if number == 2 else in_four(target)
    outcomes["rounded alike"] = released_parts(number)
    if state.is_main_process:
        torch.save(outcomes, target / f"{number}.pt")
    refused, sizes_of = ("tied and uneven", {}) if number == 2 else ("tied and uneven in four", {"tp": 2})
    (target / f"refusal of {number}-{rank}.txt").write_text(refusal(refused, target, number, **sizes_of))
    state.destroy_process_group()
